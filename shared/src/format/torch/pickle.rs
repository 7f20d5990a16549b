//! The part of the pickle format that dictionaries of tensors need, read as data: nothing is imported, called or built.
//!
//! Opcodes and globals are a short list, and everything else is an error that names it. Values live in one table and refer
//! to each other by index, so that nothing in a file can make the reader recurse; every opcode adds at most one value, and a
//! pickle has a largest length, which bounds the table, the stack and the memo.

use super::value::{Global, Id, Node, View, what};

/// State dictionaries take some kilobytes; optimisers' configurations a little more.
pub(super) const LONGEST: u64 = 1 << 20;
/// Names of storages are small numbers; tensors have few dimensions. Both are copied, so both are bounded.
const LONGEST_KEY: usize = 64;
const MOST_DIMENSIONS: usize = 8;

/// A pickle's values.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Pickle {
    nodes: Vec<Node>,
    root: Id,
}

impl Pickle {
    /// Reads a whole pickle; the error says what is wrong and where.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() as u64 > LONGEST {
            return Err(format!("a pickle of {} bytes; at most {LONGEST} are read", bytes.len()));
        }
        let machine = Machine {
            bytes,
            at: 0,
            nodes: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: Vec::new(),
        };
        machine.run()
    }

    /// The value everything hangs on.
    pub(super) fn root(&self) -> &Node {
        &self.nodes[self.root]
    }

    /// The value at an index that another value holds.
    pub(super) fn get(&self, id: Id) -> &Node {
        &self.nodes[id]
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<Id>,
    /// Heights of the stack at open marks.
    marks: Vec<usize>,
    memo: Vec<Option<Id>>,
}

impl Machine<'_> {
    fn run(mut self) -> Result<Pickle, String> {
        loop {
            let start = self.at;
            let op = self.byte()?;
            if op == b'.' {
                let root = self.pop()?;
                if !self.stack.is_empty() || !self.marks.is_empty() || self.at != self.bytes.len() {
                    return Err(format!("more than one value (the pickle ends at byte {start})"));
                }
                return Ok(Pickle { nodes: self.nodes, root });
            }
            self.step(op)
                .map_err(|what| format!("{what} (opcode 0x{op:02x} at byte {start} of the pickle)"))?;
        }
    }

    fn step(&mut self, op: u8) -> Result<(), String> {
        match op {
            0x80 => match self.byte()? {
                2 | 3 => Ok(()),
                other => Err(format!("protocol {other}; 2 and 3 are read")),
            },
            b'N' => self.push(Node::None),
            0x88 => self.push(Node::Bool(true)),
            0x89 => self.push(Node::Bool(false)),
            b'K' => self.little(1, false).and_then(|n| self.push(Node::Int(n))),
            b'M' => self.little(2, false).and_then(|n| self.push(Node::Int(n))),
            b'J' => self.little(4, true).and_then(|n| self.push(Node::Int(n))),
            0x8a => {
                let length = usize::from(self.byte()?);
                if length > 8 {
                    return Err(format!("an integer of {length} bytes; at most 8 are read"));
                }
                self.little(length, true).and_then(|n| self.push(Node::Int(n)))
            }
            b'G' => {
                let bytes = self.take(8)?;
                let bytes: [u8; 8] = bytes.try_into().map_err(|_| "cut off".to_owned())?;
                self.push(Node::Float(f64::from_be_bytes(bytes)))
            }
            b'X' => {
                let length = self.length(4)?;
                let text = std::str::from_utf8(self.take(length)?)
                    .map_err(|_| "text that is not UTF-8".to_owned())?;
                let text = text.to_owned();
                self.push(Node::Text(text))
            }
            b'}' => self.push(Node::Dict(Vec::new())),
            b']' => self.push(Node::List(Vec::new())),
            b')' => self.push(Node::Tuple(Vec::new())),
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            b't' => self.since_mark().and_then(|items| self.push(Node::Tuple(items))),
            0x85..=0x87 => {
                let mut items = Vec::new();
                for _ in 0x84..op {
                    items.push(self.pop()?);
                }
                items.reverse();
                self.push(Node::Tuple(items))
            }
            b'c' => self.global(),
            b'q' => self.length(1).and_then(|at| self.put(at)),
            b'r' => self.length(4).and_then(|at| self.put(at)),
            b'h' => self.length(1).and_then(|at| self.recall(at)),
            b'j' => self.length(4).and_then(|at| self.recall(at)),
            b'Q' => self.persistent(),
            b'R' => self.reduce(),
            b'b' => self.build(),
            b'a' | b'e' => {
                let items = if op == b'a' { vec![self.pop()?] } else { self.since_mark()? };
                match self.top()? {
                    Node::List(list) => list.extend(items),
                    other => return Err(format!("wanted a list to append to, found {}", what(other))),
                }
                Ok(())
            }
            b's' | b'u' => {
                let items = if op == b's' {
                    let value = self.pop()?;
                    vec![self.pop()?, value]
                } else {
                    self.since_mark()?
                };
                let (pairs, rest) = items.as_chunks::<2>();
                match self.top()? {
                    Node::Dict(dict) if rest.is_empty() => {
                        dict.extend(pairs.iter().map(|&[key, value]| (key, value)));
                    }
                    Node::Dict(_) => return Err("a key without a value".to_owned()),
                    other => return Err(format!("wanted a dictionary to add to, found {}", what(other))),
                }
                Ok(())
            }
            _ => Err("an operation that weights do not need; it is not run".to_owned()),
        }
    }

    fn take(&mut self, length: usize) -> Result<&[u8], String> {
        let end = self.at.checked_add(length).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| format!("the pickle is cut off at byte {}", self.bytes.len()))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        self.take(1).map(|bytes| bytes[0])
    }

    /// A little-endian integer of up to 8 bytes.
    fn little(&mut self, length: usize, signed: bool) -> Result<i64, String> {
        let bytes = self.take(length)?;
        let negative = signed && bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut whole = if negative { [0xff; 8] } else { [0; 8] };
        whole[..length].copy_from_slice(bytes);
        Ok(i64::from_le_bytes(whole))
    }

    fn length(&mut self, bytes: usize) -> Result<usize, String> {
        let length = self.little(bytes, false)?;
        usize::try_from(length).map_err(|_| format!("a length of {length}"))
    }

    fn push(&mut self, node: Node) -> Result<(), String> {
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
        Ok(())
    }

    /// Takes the last value, but none below an open mark.
    fn pop(&mut self) -> Result<Id, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let top = if self.stack.len() > floor { self.stack.pop() } else { None };
        top.ok_or_else(|| "a value is missing".to_owned())
    }

    fn top(&mut self) -> Result<&mut Node, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let top = self.stack.last().copied().filter(|_| self.stack.len() > floor);
        top.map(|id| &mut self.nodes[id]).ok_or_else(|| "a value is missing".to_owned())
    }

    fn since_mark(&mut self) -> Result<Vec<Id>, String> {
        let height = self.marks.pop().ok_or_else(|| "a mark is missing".to_owned())?;
        Ok(self.stack.split_off(height))
    }

    fn put(&mut self, at: usize) -> Result<(), String> {
        // Indices are handed out one after the other, so none is honest beyond the number of values.
        if at > self.nodes.len() {
            return Err(format!("memo entry {at} of {} values", self.nodes.len()));
        }
        let id = self.pop()?;
        self.stack.push(id);
        if self.memo.len() <= at {
            self.memo.resize(at + 1, None);
        }
        self.memo[at] = Some(id);
        Ok(())
    }

    fn recall(&mut self, at: usize) -> Result<(), String> {
        let id = self.memo.get(at).copied().flatten().ok_or_else(|| format!("nothing in memo entry {at}"))?;
        self.stack.push(id);
        Ok(())
    }

    fn line(&mut self) -> Result<String, String> {
        let rest = &self.bytes[self.at..];
        let end = rest
            .iter()
            .take(256)
            .position(|&b| b == b'\n')
            .ok_or_else(|| "a name without an end".to_owned())?;
        let line = String::from_utf8_lossy(self.take(end)?).into_owned();
        self.byte()?;
        Ok(line)
    }

    fn global(&mut self) -> Result<(), String> {
        let (module, name) = (self.line()?, self.line()?);
        match Global::of(&module, &name) {
            Some(global) => self.push(Node::Global(global)),
            None => {
                Err(format!("the global `{module}.{name}`, which weights do not need; nothing of it is run"))
            }
        }
    }

    fn tuple(&self, id: Id) -> Result<&[Id], String> {
        match &self.nodes[id] {
            Node::Tuple(items) => Ok(items),
            other => Err(format!("wanted a tuple, found {}", what(other))),
        }
    }

    fn sizes(&self, id: Id) -> Result<&[Id], String> {
        let items = self.tuple(id)?;
        if items.len() > MOST_DIMENSIONS {
            return Err(format!("{} dimensions; at most {MOST_DIMENSIONS} are read", items.len()));
        }
        Ok(items)
    }

    /// A storage by name: `("storage", type, key, device, number of elements)`.
    fn persistent(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let &[tag, kind, key, _, length] = self.tuple(id)? else {
            return Err("wanted a storage of 5 fields".to_owned());
        };
        let node = match (&self.nodes[tag], &self.nodes[kind], &self.nodes[key], &self.nodes[length]) {
            (Node::Text(tag), &Node::Global(Global::Storage(kind)), Node::Text(key), &Node::Int(length))
                if tag == "storage" && length >= 0 && key.len() <= LONGEST_KEY =>
            {
                Node::Storage { kind, key: key.clone(), length: length.unsigned_abs() }
            }
            _ => return Err("wanted (\"storage\", a storage type, a name, a device, a length)".to_owned()),
        };
        self.push(node)
    }

    fn reduce(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let arguments = self.tuple(arguments)?;
        let node = match (&self.nodes[function], arguments) {
            (Node::Global(Global::OrderedDict), []) => Node::Dict(Vec::new()),
            (Node::Global(Global::Size), &[sizes]) => Node::Tuple(self.sizes(sizes)?.to_vec()),
            (Node::Global(Global::RebuildParameter), &[data, ..]) => match &self.nodes[data] {
                tensor @ Node::Tensor(_) => tensor.clone(),
                other => return Err(format!("wanted a tensor for a parameter, found {}", what(other))),
            },
            (Node::Global(Global::RebuildTensor), &[storage, offset, shape, strides, ..]) => {
                self.tensor([storage, offset, shape, strides])?
            }
            (function, arguments) => {
                return Err(format!("a call of {} with {} arguments", what(function), arguments.len()));
            }
        };
        self.push(node)
    }

    fn tensor(&self, [storage, offset, shape, strides]: [Id; 4]) -> Result<Node, String> {
        let Node::Storage { kind, key, length } = &self.nodes[storage] else {
            return Err(format!("wanted a storage for a tensor, found {}", what(&self.nodes[storage])));
        };
        let size = |id: &Id| match self.nodes[*id] {
            Node::Int(n) if n >= 0 => Ok(n.unsigned_abs()),
            ref other => Err(format!("wanted a whole number for a tensor's place, found {}", what(other))),
        };
        let sizes = |id: Id| self.sizes(id)?.iter().map(size).collect::<Result<Vec<u64>, String>>();
        let (offset, shape, strides) = (size(&offset)?, sizes(shape)?, sizes(strides)?);
        if shape.len() != strides.len() {
            return Err(format!("a tensor of {} sizes and {} strides", shape.len(), strides.len()));
        }
        Ok(Node::Tensor(View { kind: *kind, key: key.clone(), length: *length, offset, shape, strides }))
    }

    /// Sets attributes of an object; the only one met is the `_metadata` of a state dictionary, which says nothing here.
    fn build(&mut self) -> Result<(), String> {
        self.pop()?;
        match self.top()? {
            Node::Dict(_) => Ok(()),
            other => Err(format!("wanted a dictionary to give attributes to, found {}", what(other))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::torch::value::Kind;

    /// `{"a": tensor of 2 × 3 in storage "0"}` as torch writes it, without memo entries.
    fn state() -> Vec<u8> {
        let mut bytes = b"\x80\x02}q\x00(X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n".to_vec();
        bytes.extend(b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ");
        bytes.extend(b"K\x00K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n)RtRu.");
        bytes
    }

    #[test]
    fn a_state_dictionary_is_read() {
        let pickle = Pickle::read(&state()).unwrap();
        let Node::Dict(pairs) = pickle.root() else { panic!("{:?}", pickle.root()) };
        let (key, value) = pairs[0];
        assert_eq!(*pickle.get(key), Node::Text("a".to_owned()));
        let wanted = View {
            kind: Kind::F32,
            key: "0".to_owned(),
            length: 6,
            offset: 0,
            shape: vec![2, 3],
            strides: vec![3, 1],
        };
        assert_eq!(*pickle.get(value), Node::Tensor(wanted));
    }

    #[test]
    fn integers_of_every_width_and_sign() {
        let ints: [(&[u8], i64); 7] = [
            (b"K\xff", 255),
            (b"M\x01\x02", 513),
            (b"J\xfe\xff\xff\xff", -2),
            (b"\x8a\x00", 0),
            (b"\x8a\x02\x00\xff", -256),
            (b"\x8a\x05\0\0\0\0\x01", 1 << 32),
            (b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", i64::MAX),
        ];
        for (bytes, wanted) in ints {
            let pickle = Pickle::read(&[b"\x80\x02", bytes, b"."].concat()).unwrap();
            assert_eq!(*pickle.root(), Node::Int(wanted));
        }
    }

    #[test]
    fn hostile_pickles_are_errors_that_say_why() {
        let cases: [(&[u8], &str); 22] = [
            (b"cos\nsystem\n(X\x02\0\0\0lstR.", "global `os.system`"),
            (b"c__builtin__\neval\n.", "global `__builtin__.eval`"),
            (b"ctorch\nload\n.", "global `torch.load`"),
            (b"cposix\nsystem", "without an end"),
            (b"\x8a\xff", "an integer of 255 bytes"),
            (b"\x80\x04.", "protocol 4"),
            (b"\x93.", "not run"),
            (b"i", "not run"),
            (b"o.", "not run"),
            (b"2.", "not run"),
            (b"\x81.", "not run"),
            (b"Pxx\n.", "not run"),
            (b"R.", "missing"),
            (b"(R.", "missing"),
            (b"N(0.", "not run"),
            (b"t.", "a mark is missing"),
            (b"h\x07.", "memo entry 7"),
            (b"Nr\xff\xff\xff\x7f.", "memo entry 2147483647"),
            (b"X\xff\xff\xff\xff.", "cut off"),
            (b"}(Nu.", "without a value"),
            (b"NN.", "more than one value"),
            (b"))R.", "a call of a tuple"),
        ];
        for (bytes, wanted) in cases {
            let error = Pickle::read(bytes).unwrap_err();
            assert!(error.contains(wanted), "{error} does not say {wanted}");
        }
        assert!(Pickle::read(&vec![b'N'; LONGEST as usize + 1]).is_err());
    }

    #[test]
    fn depth_costs_nothing() {
        // A million tuples in each other, a million marks, and a dictionary that holds itself.
        let mut deep = vec![b')'];
        deep.resize(1_000_000, 0x85);
        deep.push(b'.');
        assert!(matches!(Pickle::read(&deep).unwrap().root(), Node::Tuple(_)));
        assert!(Pickle::read(&vec![b'('; 1_000_000]).is_err());
        assert!(matches!(Pickle::read(b"}q\0h\0h\0s.").unwrap().root(), Node::Dict(_)));
        // A tuple of many, its sizes copied many times.
        let mut wide = b"(".to_vec();
        wide.resize(500_000, b'N');
        wide.extend(b"tq\0");
        wide.extend(b"ctorch\nSize\nh\0\x85R".repeat(1000));
        assert!(Pickle::read(&wide).unwrap_err().contains("dimensions"));
    }

    #[test]
    fn truncated_and_damaged_pickles_never_panic() {
        let good = state();
        for length in 0..good.len() {
            assert!(Pickle::read(&good[..length]).is_err(), "cut at {length}");
        }
        for at in 0..good.len() {
            for value in 0..=255u8 {
                let mut bad = good.clone();
                bad[at] = value;
                let _ = Pickle::read(&bad);
            }
        }
    }
}
