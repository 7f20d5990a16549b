//! Requests to the hub: redirects followed by hand, failures told apart, what may be repeated repeated.

use std::io::{self, Read};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use ureq::Agent;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::tls::{RootCerts, TlsConfig};

use super::id::RepoId;
use super::settings::Settings;
use crate::stop::{self, Stopped};

/// Redirects in a row that are followed.
const MOST_REDIRECTS: usize = 10;
/// Requests without any progress before one gives up.
const MOST_TRIES: u32 = 5;
/// The longest answer of the programming interface that is taken.
const LONGEST_ANSWER: u64 = 1 << 26;

/// The one way to the network.
#[derive(Debug)]
pub(super) struct Http {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    offline: bool,
    pause: Duration,
}

/// What went wrong with a request.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The network, or a server in trouble: trying again may help.
    #[error("{0}")]
    Passing(String),
    /// Trying again does not help.
    #[error("{0:#}")]
    Final(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Final(error)
    }
}

/// The hub could not be reached at all; what is in the cache may still serve.
#[derive(Debug, thiserror::Error)]
#[error("cannot reach {endpoint}: {message}")]
pub(super) struct Unreachable {
    endpoint: String,
    message: String,
}

/// An answer: its header and a reader of its body.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Box<dyn Read>,
}

impl Answer {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

impl Http {
    pub(super) fn new(settings: &Settings) -> Self {
        // The machine's own certificates: where a company inspects connections, its certificate is among them.
        let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
        let agent = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .user_agent(concat!("stratascope/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        let Settings { endpoint, token, offline, pause, .. } = settings.clone();
        Self { agent, endpoint, token, offline, pause }
    }

    /// Asks for `url` from byte `from` on, following redirects. The token goes to the hub and to nobody else.
    pub(super) fn get(&self, url: &str, from: u64, id: &RepoId, page: &str) -> Result<Answer, Failure> {
        ensure_online(self.offline, id)?;
        let mut url = url.to_owned();
        for _ in 0..=MOST_REDIRECTS {
            let mut request = self.agent.get(&url).header("Accept-Encoding", "identity");
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            if let Some(token) = self.token.as_ref().filter(|_| origin(&url) == origin(&self.endpoint)) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let response = request.call().map_err(|error| failure(&url, error))?;
            if !response.status().is_redirection() {
                return self.judge(response, id, page);
            }
            let location = response.headers().get("location").and_then(|value| value.to_str().ok());
            let location = location.with_context(|| format!("{url} redirects to nowhere"))?;
            url = join(&url, location).with_context(|| format!("{url} redirects to `{location}`"))?;
            let downgrade = self.endpoint.starts_with("https://") && !url.starts_with("https://");
            if downgrade {
                return Err(anyhow!("the hub redirects to {url}, which is not encrypted").into());
            }
        }
        Err(anyhow!("{url}: more than {MOST_REDIRECTS} redirects").into())
    }

    /// [`Http::get`] of a whole JSON answer, repeated while it helps; also the address of the next page, if there is one.
    pub(super) fn json<T: serde::de::DeserializeOwned>(
        &self,
        url: &str,
        id: &RepoId,
        page: &str,
    ) -> Result<(T, Option<String>)> {
        self.repeat(|| {
            let answer = self.get(url, 0, id, page)?;
            let next = answer.header("link").and_then(next_page);
            let next = next.map(|next| join(url, &next).with_context(|| format!("{url}: bad next page")));
            let next = next.transpose()?;
            let mut bytes = Vec::new();
            let read = answer.body.take(LONGEST_ANSWER + 1).read_to_end(&mut bytes);
            read.map_err(|error| Failure::Passing(format!("{url}: {error}")))?;
            if bytes.len() as u64 > LONGEST_ANSWER {
                return Err(anyhow!("{url}: the answer is longer than {LONGEST_ANSWER} bytes").into());
            }
            let value = serde_json::from_slice(&bytes)
                .with_context(|| format!("{url}: the answer is not what a hub answers"))?;
            Ok((value, next))
        })
    }

    /// Does `work` until it succeeds, fails for good, or has failed too often.
    pub(super) fn repeat<T>(&self, mut work: impl FnMut() -> Result<T, Failure>) -> Result<T> {
        let mut tries = 0;
        loop {
            let message = match work() {
                Ok(value) => return Ok(value),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(message)) => message,
            };
            tries += 1;
            if tries >= MOST_TRIES {
                return Err(Unreachable { endpoint: self.endpoint.clone(), message }.into());
            }
            tracing::info!("{message}; trying again");
            self.wait(tries)?;
        }
    }

    /// Waits before try number `tries + 1`, twice as long each time, looking out for a request to stop.
    fn wait(&self, tries: u32) -> Result<()> {
        let mut left = self.pause * (1 << (tries - 1).min(6));
        let step = Duration::from_millis(100);
        while !left.is_zero() {
            if stop::is_raised() {
                return Err(Stopped.into());
            }
            let now = left.min(step);
            thread::sleep(now);
            left -= now;
        }
        Ok(())
    }

    /// Tells a good answer from the ways in which the hub refuses.
    fn judge(&self, response: Response<ureq::Body>, id: &RepoId, page: &str) -> Result<Answer, Failure> {
        let (parts, body) = response.into_parts();
        let status = parts.status;
        if status.is_success() || status == StatusCode::RANGE_NOT_SATISFIABLE {
            let body = body.into_with_config().limit(u64::MAX).reader();
            return Ok(Answer { status, headers: parts.headers, body: Box::new(body) });
        }
        let header = |name: &str| parts.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let (code, message) = (header("x-error-code"), header("x-error-message"));
        if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() {
            let hint = if status.is_server_error() { "" } else { "; a token (HF_TOKEN) raises the limit" };
            return Err(Failure::Passing(format!("the hub answers {status} {message}{hint}")));
        }
        Err(Failure::Final(self.refusal(status, code, message, id, page)))
    }

    /// One clear sentence for each way of being refused.
    fn refusal(
        &self,
        status: StatusCode,
        code: &str,
        message: &str,
        id: &RepoId,
        page: &str,
    ) -> anyhow::Error {
        let token = if self.token.is_some() { "the token given (HF_TOKEN)" } else { "no token" };
        let quoted = if message.is_empty() { String::new() } else { format!(" (the hub says: {message})") };
        match (code, status.as_u16()) {
            ("GatedRepo", _) | (_, 403) => anyhow!(
                "{id} is gated: accept its licence at {page}, then set HF_TOKEN to a token of the account that \
                 accepted it; {token} was sent{quoted}"
            ),
            ("RepoNotFound", _) => anyhow!(
                "there is no {id} at {}, or it is private and {token} was sent, which does not open it{quoted}",
                self.endpoint
            ),
            ("RevisionNotFound", _) => {
                anyhow!("{id} has no revision `{}`: see {page}{quoted}", id.revision)
            }
            ("EntryNotFound", _) => anyhow!("{id} has no such file at `{}`{quoted}", id.revision),
            (_, 401) if self.token.is_some() => anyhow!(
                "the hub does not accept the token given (HF_TOKEN, or the one stored by logging in): renew it, or \
                 unset it for what needs none{quoted}"
            ),
            (_, 401 | 404) => {
                anyhow!("there is no {id} at {}, or it needs a token (HF_TOKEN){quoted}", self.endpoint)
            }
            _ => anyhow!("the hub answers {status} for {id}{quoted}"),
        }
    }
}

fn ensure_online(offline: bool, id: &RepoId) -> Result<(), Failure> {
    if offline {
        return Err(anyhow!(
            "{id} is not complete in the cache, and the network is forbidden (--offline or HF_HUB_OFFLINE)"
        )
        .into());
    }
    Ok(())
}

fn failure(url: &str, error: ureq::Error) -> Failure {
    let certificate = matches!(error, ureq::Error::Rustls(_) | ureq::Error::Tls(_));
    let bad = matches!(error, ureq::Error::BadUri(_) | ureq::Error::InvalidProxyUrl | ureq::Error::Http(_));
    let text = format!("{}: {error}", origin(url).unwrap_or(url));
    if certificate {
        return anyhow!("{text}: the server's certificate is not trusted by this machine").into();
    }
    // Certificate faults met in the middle of a handshake arrive as input errors.
    let invalid = matches!(&error, ureq::Error::Io(e) if e.kind() == io::ErrorKind::InvalidData);
    if bad || invalid { anyhow!(text).into() } else { Failure::Passing(text) }
}

/// `scheme://host:port` of an address.
fn origin(url: &str) -> Option<&str> {
    let after = url.find("://")? + 3;
    let end = url[after..].find(['/', '?', '#']).map_or(url.len(), |at| after + at);
    Some(&url[..end])
}

/// The address that `location`, given by the answer from `url`, means.
fn join(url: &str, location: &str) -> Option<String> {
    if location.starts_with("https://") || location.starts_with("http://") {
        return Some(location.to_owned());
    }
    let origin = origin(url)?;
    if let Some(rest) = location.strip_prefix("//") {
        return Some(format!("{}://{rest}", url.split_once("://")?.0));
    }
    if location.starts_with('/') {
        return Some(format!("{origin}{location}"));
    }
    let path = url.split(['?', '#']).next()?;
    let folder = &path[..path.rfind('/').filter(|&at| at >= origin.len()).unwrap_or(path.len())];
    Some(format!("{folder}/{location}"))
}

/// The address marked `rel="next"` in a `Link` header.
fn next_page(link: &str) -> Option<String> {
    let entry = link.split(',').find(|entry| entry.contains("rel=\"next\""))?;
    Some(entry[entry.find('<')? + 1..entry.find('>')?].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart_and_joined() {
        assert_eq!(origin("https://a.b:8/c/d?x=1"), Some("https://a.b:8"));
        assert_eq!(origin("https://a.b?x"), Some("https://a.b"));
        // A user name that looks like the hub is part of the authority, so it is another origin.
        assert_ne!(origin("https://hub.co@evil.com/x"), origin("https://hub.co/x"));
        let base = "https://a.b/c/d?x=1";
        for (location, meant) in [
            ("https://o.p/q", "https://o.p/q"),
            ("//o.p/q", "https://o.p/q"),
            ("/q/r", "https://a.b/q/r"),
            ("q", "https://a.b/c/q"),
        ] {
            assert_eq!(join(base, location).unwrap(), meant);
        }
        let link = "<https://a.b/t?cursor=x>; rel=\"next\", <https://a.b/p>; rel=\"prev\"";
        assert_eq!(next_page(link).unwrap(), "https://a.b/t?cursor=x");
        assert_eq!(next_page("<https://a.b/p>; rel=\"prev\""), None);
    }
}
