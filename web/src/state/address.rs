//! The address of every state of the page, as the fragment of a URL: `#/p/<pack>/f/12`.
//!
//! Unknown keys and values are ignored, so that an address of a later version still leads somewhere.

use std::fmt;

use super::choice::Wish;
use super::list::ListView;

/// A page with its state.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Address {
    /// What is shown.
    pub route: Route,
    /// The backend asked for; kept across pages.
    pub backend: Wish,
}

/// What is shown.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Route {
    /// `#/`: all packs.
    #[default]
    Overview,
    /// `#/p/<pack>`: the latents of a pack.
    List {
        /// Name of the pack.
        pack: String,
        /// Order, filter and search.
        view: ListView,
    },
    /// `#/p/<pack>/f/<latent>`: one latent.
    Feature {
        /// Name of the pack.
        pack: String,
        /// Its index in the dictionary.
        latent: u32,
    },
    /// `#/p/<pack>/try`: a text, encoded here and now.
    Try {
        /// Name of the pack.
        pack: String,
        /// Text, token and latent.
        view: TryView,
    },
    /// `#/p/<pack>/flow`: a text across the layers of a multi-layer autoencoder.
    Flow {
        /// Name of the pack.
        pack: String,
        /// What is locked.
        view: FlowView,
    },
    /// `#/selftest`: does this machine compute right?
    SelfTest,
    /// Anything else, as it was typed.
    Unknown(String),
}

/// What is chosen on the page that encodes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TryView {
    /// Id of the text; the first when absent.
    pub text: Option<String>,
    /// The locked token.
    pub token: Option<u32>,
    /// The latent that shades the text.
    pub latent: Option<u32>,
    /// Leave latents that fire on more than a tenth of all tokens out of the lists.
    pub hide_dense: bool,
}

/// What is locked on the page across layers; what is not follows the pointer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FlowView {
    /// Id of the text; the first when absent.
    pub text: Option<String>,
    /// The token.
    pub token: Option<u32>,
    /// The number of the layer, in the order of the pack.
    pub layer: Option<u32>,
    /// The latent.
    pub latent: Option<u32>,
    /// Encode here and now instead of showing the pack's codes.
    pub live: bool,
}

impl Route {
    /// The pack this page belongs to.
    #[must_use]
    pub fn pack(&self) -> Option<&str> {
        match self {
            Self::List { pack, .. }
            | Self::Feature { pack, .. }
            | Self::Try { pack, .. }
            | Self::Flow { pack, .. } => Some(pack),
            Self::Overview | Self::SelfTest | Self::Unknown(_) => None,
        }
    }

    /// The list of `pack` as it opens first.
    #[must_use]
    pub fn list(pack: &str) -> Self {
        Self::List { pack: pack.to_owned(), view: ListView::default() }
    }

    /// The page of one latent.
    #[must_use]
    pub fn feature(pack: &str, latent: u32) -> Self {
        Self::Feature { pack: pack.to_owned(), latent }
    }

    /// The page across layers, with nothing locked yet.
    #[must_use]
    pub fn flow(pack: &str) -> Self {
        Self::Flow { pack: pack.to_owned(), view: FlowView::default() }
    }

    /// The page that encodes, with nothing chosen yet.
    #[must_use]
    pub fn try_it(pack: &str) -> Self {
        Self::Try { pack: pack.to_owned(), view: TryView::default() }
    }
}

impl Address {
    /// Reads the fragment of a URL, with or without its `#`. Every text is some address.
    #[must_use]
    pub fn parse(fragment: &str) -> Self {
        let fragment = fragment.strip_prefix('#').unwrap_or(fragment);
        let (path, query) = fragment.split_once('?').unwrap_or((fragment, ""));
        let pairs: Vec<(String, String)> = query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (decode(key), decode(value)))
            .collect();
        let get = |key: &str| pairs.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
        let parts: Vec<String> = path.split('/').filter(|part| !part.is_empty()).map(decode).collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let route = match parts[..] {
            [] => Route::Overview,
            ["selftest"] => Route::SelfTest,
            ["p", pack] => Route::List { pack: pack.to_owned(), view: ListView::parse(get) },
            ["p", pack, "f", latent] => latent
                .parse()
                .map_or_else(|_| Route::Unknown(path.to_owned()), |latent| Route::feature(pack, latent)),
            ["p", pack, "try"] => Route::Try {
                pack: pack.to_owned(),
                view: TryView {
                    text: get("text").map(str::to_owned),
                    token: get("tok").and_then(|t| t.parse().ok()),
                    latent: get("latent").and_then(|l| l.parse().ok()),
                    hide_dense: get("dense") == Some("hide"),
                },
            },
            ["p", pack, "flow"] => Route::Flow {
                pack: pack.to_owned(),
                view: FlowView {
                    text: get("text").map(str::to_owned),
                    token: get("tok").and_then(|t| t.parse().ok()),
                    layer: get("layer").and_then(|l| l.parse().ok()),
                    latent: get("latent").and_then(|l| l.parse().ok()),
                    live: get("live") == Some("1"),
                },
            },
            _ => Route::Unknown(path.to_owned()),
        };
        Self { route, backend: get("backend").map(Wish::parse).unwrap_or_default() }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut query: Vec<(&str, String)> = Vec::new();
        f.write_str("#")?;
        match &self.route {
            Route::Overview => f.write_str("/")?,
            Route::SelfTest => f.write_str("/selftest")?,
            Route::Unknown(path) => f.write_str(path)?,
            Route::List { pack, view } => {
                write!(f, "/p/{}", encode(pack))?;
                query = view.query();
            }
            Route::Feature { pack, latent } => write!(f, "/p/{}/f/{latent}", encode(pack))?,
            Route::Flow { pack, view } => {
                write!(f, "/p/{}/flow", encode(pack))?;
                let number = |n: Option<u32>| n.map(|n| n.to_string());
                let pairs = [
                    ("text", view.text.clone()),
                    ("tok", number(view.token)),
                    ("layer", number(view.layer)),
                    ("latent", number(view.latent)),
                    ("live", view.live.then(|| "1".to_owned())),
                ];
                query.extend(pairs.into_iter().filter_map(|(key, value)| Some((key, value?))));
            }
            Route::Try { pack, view } => {
                write!(f, "/p/{}/try", encode(pack))?;
                let (token, latent) = (view.token.map(|t| t.to_string()), view.latent.map(|l| l.to_string()));
                let dense = view.hide_dense.then(|| "hide".to_owned());
                let pairs =
                    [("text", view.text.clone()), ("tok", token), ("latent", latent), ("dense", dense)];
                query.extend(pairs.into_iter().filter_map(|(key, value)| Some((key, value?))));
            }
        }
        if let Some(backend) = self.backend.key() {
            query.push(("backend", backend.to_owned()));
        }
        for (i, (key, value)) in query.iter().enumerate() {
            write!(f, "{}{key}={}", if i == 0 { '?' } else { '&' }, encode(value))?;
        }
        Ok(())
    }
}

/// Percent-encodes everything but unreserved characters.
fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// Undoes [`encode`]; what is not an escape stays as it is, broken UTF-8 becomes U+FFFD.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let escape = (bytes[i] == b'%').then(|| bytes.get(i + 1..i + 3)).flatten();
        let byte = escape.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        out.push(byte.unwrap_or(if bytes[i] == b'+' { b' ' } else { bytes[i] }));
        i += if byte.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::option;
    use proptest::prelude::*;

    use super::*;
    use crate::state::list::{Filter, Sort};

    fn routes() -> impl Strategy<Value = Route> {
        let view = (
            prop::sample::select(Sort::ALL.to_vec()),
            any::<bool>(),
            prop::sample::select(Filter::ALL.to_vec()),
            ".{0,12}",
        )
            .prop_map(|(sort, reversed, filter, search)| ListView { sort, reversed, filter, search });
        let chosen =
            (option::of(".{1,9}"), option::of(any::<u32>()), option::of(any::<u32>()), any::<bool>())
                .prop_map(|(text, token, latent, hide_dense)| TryView { text, token, latent, hide_dense });
        let locked = (option::of(".{1,9}"), prop::array::uniform3(option::of(any::<u32>())), any::<bool>())
            .prop_map(|(text, [token, layer, latent], live)| FlowView { text, token, layer, latent, live });
        prop_oneof![
            Just(Route::Overview),
            Just(Route::SelfTest),
            (".{1,9}", view).prop_map(|(pack, view)| Route::List { pack, view }),
            (".{1,9}", any::<u32>()).prop_map(|(pack, latent)| Route::Feature { pack, latent }),
            (".{1,9}", locked).prop_map(|(pack, view)| Route::Flow { pack, view }),
            (".{1,9}", chosen).prop_map(|(pack, view)| Route::Try { pack, view }),
        ]
    }

    proptest! {
        #[test]
        fn every_address_round_trips(
            route in routes(),
            backend in prop::sample::select(vec![Wish::Auto, Wish::Cpu, Wish::Gpu]),
        ) {
            let address = Address { route, backend };
            let written = address.to_string();
            prop_assert!(written.is_ascii(), "{}", written);
            prop_assert_eq!(Address::parse(&written), address);
        }

        #[test]
        fn every_text_is_some_address(text in ".{0,40}") {
            let address = Address::parse(&text);
            let _ = address.to_string();
        }
    }

    #[test]
    fn unknown_keys_are_ignored_and_defaults_are_not_written() {
        let address = Address::parse("#/p/demo/try?zoom=3&tok=7&&x&latent=no&backend=abacus");
        let view = TryView { token: Some(7), ..TryView::default() };
        assert_eq!(address.route, Route::Try { pack: "demo".to_owned(), view });
        assert_eq!(address.backend, Wish::Auto);
        assert_eq!(address.to_string(), "#/p/demo/try?tok=7");
        assert_eq!(Address::parse("#/p/demo?sort=nonsense").to_string(), "#/p/demo");
        assert_eq!(Address::parse("").route, Route::Overview);
        assert_eq!(Address::parse("#/p/demo/f/x").route, Route::Unknown("/p/demo/f/x".to_owned()));
        assert_eq!(decode("a%2"), "a%2");
        assert_eq!(decode("%zz%41+"), "%zzA ");
    }
}
