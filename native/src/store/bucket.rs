//! A prefix of a bucket of an S3-compatible store or of Google Cloud Storage, behind blocking calls.
//!
//! The client is asynchronous; a small runtime of its own drives it, and nothing outside this file knows.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use futures_util::TryStreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path as Key;
use object_store::{
    Attribute, Attributes, Error, GetOptions, ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions,
    PutPayload, RetryConfig, WriteMultipart,
};
use tokio::runtime::Runtime;

use super::manifest::FileInfo;

/// Settings of which one says who we are.
const S3_CREDENTIALS: [&str; 5] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
];
/// The same for Google.
const GS_CREDENTIALS: [&str; 5] = [
    "SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SKIP_SIGNATURE",
];
/// Objects up to this length are sent in one request.
const WHOLE: u64 = 8 << 20;
/// Parts of one object on their way at the same time.
const PARTS: usize = 4;
/// An object has at most this many parts.
const MOST_PARTS: u64 = 9_000;
/// The object's own record of its SHA-256, by which a resumed harvest knows what is there.
const SHA256: Attribute = Attribute::Metadata(std::borrow::Cow::Borrowed("sha256"));

/// What an object store knows of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) bytes: u64,
    /// The hash recorded with it, if it was sent by this program.
    pub(crate) sha256: Option<String>,
}

/// A bucket, and the prefix of all keys used in it.
#[derive(Debug)]
pub struct Bucket {
    client: Box<dyn ObjectStore>,
    /// `s3://bucket` or `gs://bucket`.
    root: String,
    prefix: String,
    /// Whether the settings named credentials; otherwise the machine's own role is asked for.
    named: bool,
}

fn runtime() -> Result<&'static Runtime> {
    static RUNTIME: OnceLock<std::io::Result<Runtime>> = OnceLock::new();
    let made = RUNTIME.get_or_init(|| {
        // Fails when a provider is installed already, which does as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()
    });
    made.as_ref().map_err(|error| anyhow!("cannot start the network threads: {error}"))
}

impl Bucket {
    /// The bucket and prefix that `url` names, reached as `settings` say: the environment's `AWS_*` or `GOOGLE_*`.
    /// Nothing is asked of the network yet.
    ///
    /// # Errors
    /// If the URL's scheme is neither `s3` nor `gs`, it names no bucket, or a setting cannot be meant.
    pub(super) fn connect(url: &str, settings: impl Iterator<Item = (String, String)>) -> Result<Self> {
        let settings: Vec<_> = settings.collect();
        let (scheme, rest) = url.split_once("://").unwrap_or_default();
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        ensure!(
            matches!(scheme, "s3" | "gs"),
            "{url}: wanted a folder, file:///folder, s3://bucket/prefix or gs://bucket/prefix"
        );
        ensure!(!bucket.is_empty(), "{url} names no bucket, as {scheme}://bucket/prefix does");
        let _entered = runtime()?.enter();
        let names = if scheme == "s3" { &S3_CREDENTIALS[..] } else { &GS_CREDENTIALS[..] };
        let named = settings.iter().any(|(name, _)| names.contains(&name.as_str()));
        let settings = settings.into_iter();
        // Long enough for a busy service, short enough to tell a person that there is none.
        let retries =
            RetryConfig { max_retries: 5, retry_timeout: Duration::from_secs(60), ..RetryConfig::default() };
        let client: Box<dyn ObjectStore> = if scheme == "s3" {
            Box::new(s3(bucket, settings, retries).with_context(|| format!("cannot use {url}"))?)
        } else {
            let mut builder = GoogleCloudStorageBuilder::new().with_bucket_name(bucket).with_retry(retries);
            for (name, value) in
                settings.filter(|(name, _)| name.starts_with("GOOGLE_") || name == "SERVICE_ACCOUNT")
            {
                if let Ok(key) = name.to_ascii_lowercase().parse() {
                    builder = builder.with_config(key, value);
                }
            }
            Box::new(builder.build().with_context(|| format!("cannot use {url}"))?)
        };
        let prefix = prefix.trim_matches('/').to_owned();
        Ok(Self { client, root: format!("{scheme}://{bucket}"), prefix, named })
    }

    fn path(&self, name: &str) -> String {
        let parts = [self.prefix.as_str(), name].into_iter().filter(|part| !part.is_empty());
        parts.collect::<Vec<_>>().join("/")
    }

    /// How people know the object `name`.
    pub(crate) fn url(&self, name: &str) -> String {
        [self.root.clone(), self.path(name)]
            .into_iter()
            .filter(|p| !p.is_empty())
            .collect::<Vec<_>>()
            .join("/")
    }

    fn key(&self, name: &str) -> Result<Key> {
        Key::parse(self.path(name)).with_context(|| format!("{} is no key of an object", self.url(name)))
    }

    fn explain(&self, doing: &str, name: &str, error: Error) -> anyhow::Error {
        let hint = match &error {
            Error::NotFound { .. } => ": it does not exist",
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
                ": access was refused; check the credentials in the environment (AWS_ACCESS_KEY_ID and \
                 AWS_SECRET_ACCESS_KEY, or GOOGLE_SERVICE_ACCOUNT) and what they may do"
            }
            _ if !self.named => {
                " (no credentials are set in the environment, so this machine's own were asked for; set \
                 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or GOOGLE_SERVICE_ACCOUNT)"
            }
            _ => "",
        };
        anyhow!(error).context(format!("cannot {doing} {}{hint}", self.url(name)))
    }

    /// What the store knows of the object `name`; `None` where there is none.
    ///
    /// # Errors
    /// If the bucket does not exist, access is refused, or the store cannot be reached.
    pub(crate) fn find(&self, name: &str) -> Result<Option<Found>> {
        let key = self.key(name)?;
        let options = GetOptions { head: true, ..GetOptions::default() };
        match runtime()?.block_on(self.client.get_opts(&key, options)) {
            Ok(found) => Ok(Some(Found {
                bytes: found.meta.size,
                sha256: found.attributes.get(&SHA256).map(|v| v.as_ref().to_owned()),
            })),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.explain("read", name, error)),
        }
    }

    /// Bytes `range` of the object `name`.
    pub(super) fn range(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>> {
        let key = self.key(name)?;
        let wanted = range.end - range.start;
        let got = runtime()?.block_on(self.client.get_range(&key, range));
        let got = got.map_err(|error| self.explain("read", name, error))?;
        ensure!(got.len() as u64 == wanted, "{}: {} bytes came, wanted {wanted}", self.url(name), got.len());
        Ok(got.into())
    }

    /// The names of all objects under the prefix, and their lengths.
    ///
    /// # Errors
    /// As [`Bucket::find`].
    pub(crate) fn list(&self) -> Result<BTreeMap<String, u64>> {
        let prefix = (!self.prefix.is_empty()).then(|| self.key("")).transpose()?;
        let listed = runtime()?.block_on(self.client.list(prefix.as_ref()).try_collect::<Vec<_>>());
        let listed = listed.map_err(|error| self.explain("list", "", error))?;
        let name = |key: &Key| {
            let key = key.as_ref();
            key.strip_prefix(&self.prefix).unwrap_or(key).trim_start_matches('/').to_owned()
        };
        Ok(listed.into_iter().map(|object| (name(&object.location), object.size)).collect())
    }

    /// Whether the object `name` is there with the length and hash of `info`.
    ///
    /// # Errors
    /// As [`Bucket::find`].
    pub(crate) fn has(&self, name: &str, info: &FileInfo) -> Result<bool> {
        let found = self.find(name)?;
        Ok(found.is_some_and(|f| f.bytes == info.bytes && f.sha256.as_ref() == Some(&info.sha256)))
    }

    /// Sends the file `path`, which is `info`, as the object `name`, unless the same is there already.
    ///
    /// # Errors
    /// If the file cannot be read or has another length, access is refused, or the store cannot be reached.
    pub(crate) fn send(&self, path: &Path, name: &str, info: &FileInfo) -> Result<()> {
        if self.has(name, info)? {
            return Ok(());
        }
        let context = || format!("cannot read {}", path.display());
        let mut file = File::open(path).with_context(context)?;
        let found = file.metadata().with_context(context)?.len();
        ensure!(found == info.bytes, "{} has {found} bytes, expected {}", path.display(), info.bytes);
        let attributes: Attributes = [(SHA256, info.sha256.clone())].into_iter().collect();
        if info.bytes <= WHOLE {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).with_context(context)?;
            return self.put(name, bytes, attributes);
        }
        let key = self.key(name)?;
        let sent = runtime()?.block_on(async {
            let options = PutMultipartOptions { attributes, ..PutMultipartOptions::default() };
            let upload = self.client.put_multipart_opts(&key, options).await?;
            let part = usize::try_from(WHOLE.max(info.bytes.div_ceil(MOST_PARTS))).unwrap_or(usize::MAX);
            let mut upload = WriteMultipart::new_with_chunk_size(upload, part);
            let mut piece = vec![0; 1 << 20];
            loop {
                let read = match file.read(&mut piece) {
                    Ok(0) => break,
                    Ok(read) => read,
                    Err(error) => {
                        upload.abort().await?;
                        return Ok(Err(error));
                    }
                };
                upload.wait_for_capacity(PARTS).await?;
                upload.write(&piece[..read]);
            }
            upload.finish().await.map(|_| Ok(()))
        });
        sent.map_err(|error| self.explain("write", name, error))?.with_context(context)
    }

    /// Writes `bytes` as the object `name`, over what may be there.
    ///
    /// # Errors
    /// If access is refused, or the store cannot be reached.
    pub(crate) fn write(&self, name: &str, bytes: Vec<u8>) -> Result<()> {
        self.put(name, bytes, Attributes::default())
    }

    fn put(&self, name: &str, bytes: Vec<u8>, attributes: Attributes) -> Result<()> {
        let key = self.key(name)?;
        let options = PutOptions { attributes, ..PutOptions::default() };
        let sent = runtime()?.block_on(self.client.put_opts(&key, PutPayload::from(bytes), options));
        sent.map(drop).map_err(|error| self.explain("write", name, error))
    }
}

fn s3(
    bucket: &str,
    settings: impl Iterator<Item = (String, String)>,
    retries: RetryConfig,
) -> Result<object_store::aws::AmazonS3> {
    let mut builder = AmazonS3Builder::new().with_bucket_name(bucket).with_retry(retries);
    let mut http = false;
    for (name, value) in settings.filter(|(name, _)| name.starts_with("AWS_")) {
        // An endpoint that is given as plain http is meant so.
        http |= name.starts_with("AWS_ENDPOINT") && value.starts_with("http://");
        if name.starts_with("AWS_ENDPOINT") && !value.contains("://") {
            bail!("{name} is `{value}`, expected a URL such as http://127.0.0.1:9000");
        }
        if let Ok(key) = name.to_ascii_lowercase().parse() {
            builder = builder.with_config(key, value);
        }
    }
    if http {
        builder = builder.with_allow_http(true);
    }
    Ok(builder.build()?)
}
