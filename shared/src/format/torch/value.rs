//! The values a pickle of weights is made of.

/// The index of a value.
pub(super) type Id = usize;

/// The element type of a storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl Kind {
    /// Bytes of an element.
    pub(super) fn bytes(self) -> u64 {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }
}

/// The names a pickle may refer to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Size,
    Storage(Kind),
}

impl Global {
    pub(super) fn of(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "Size") => Self::Size,
            ("torch", storage) => Self::Storage(match storage {
                "DoubleStorage" => Kind::F64,
                "FloatStorage" => Kind::F32,
                "HalfStorage" => Kind::F16,
                "BFloat16Storage" => Kind::Bf16,
                "LongStorage" => Kind::I64,
                "IntStorage" => Kind::I32,
                "ShortStorage" => Kind::I16,
                "CharStorage" => Kind::I8,
                "ByteStorage" => Kind::U8,
                "BoolStorage" => Kind::Bool,
                _ => return None,
            }),
            _ => return None,
        })
    }
}

/// A view into a storage: element `i, j, …` is the storage's element `offset + i·strides[0] + j·strides[1] + …`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct View {
    pub(super) kind: Kind,
    /// The storage's name in the archive.
    pub(super) key: String,
    /// Elements the storage is said to have.
    pub(super) length: u64,
    pub(super) offset: u64,
    pub(super) shape: Vec<u64>,
    pub(super) strides: Vec<u64>,
}

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    /// In the order written; a key that occurs twice is refused when it is looked up by the reader of the dictionary.
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage {
        kind: Kind,
        key: String,
        length: u64,
    },
    Tensor(View),
}

/// The kind of a value, for messages.
pub(super) fn what(node: &Node) -> &'static str {
    match node {
        Node::None => "None",
        Node::Bool(_) => "a truth value",
        Node::Int(_) => "an integer",
        Node::Float(_) => "a float",
        Node::Text(_) => "text",
        Node::Tuple(_) => "a tuple",
        Node::List(_) => "a list",
        Node::Dict(_) => "a dictionary",
        Node::Global(_) => "a type",
        Node::Storage { .. } => "a storage",
        Node::Tensor(_) => "a tensor",
    }
}
