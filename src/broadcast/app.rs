//! Apps (tenants): who may broadcast, and how often.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use secrecy::SecretString;

use super::quota::Limits;

/// The longest app key, in bytes.
pub const MAX_APP_KEY: usize = 64;

/// An app's key: 1 to 64 of `A-Z a-z 0-9 _ . -`, so that it is safe inside a Redis hash tag, a channel name and a log line.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AppKey(Arc<str>);

impl AppKey {
    /// Checks the characters and the length.
    ///
    /// # Errors
    /// A sentence that says which rule is broken.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        if text.is_empty() || text.len() > MAX_APP_KEY {
            return Err("an app key has 1 to 64 characters");
        }
        if !text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-')) {
            return Err("an app key is made of A-Z a-z 0-9 _ . -");
        }
        Ok(Self(text.into()))
    }

    /// The key as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for AppKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for AppKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

impl std::borrow::Borrow<str> for AppKey {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// What is known of one app.
#[derive(Debug)]
pub struct App {
    /// Its key.
    pub key: AppKey,
    /// Signs its server calls (NIM's AppSecret) and its devices' tokens.
    pub secret: SecretString,
    /// Whether broadcasts are activated; if not, every request of it is refused with 403.
    pub broadcast: bool,
    /// Its quota.
    pub limits: Limits,
}

/// All apps that this process knows, by key. Built once from the settings.
#[derive(Debug, Clone, Default)]
pub struct Directory {
    apps: Arc<HashMap<AppKey, Arc<App>>>,
}

impl Directory {
    /// Builds the directory.
    ///
    /// # Errors
    /// The key that occurs twice.
    pub fn new(apps: impl IntoIterator<Item = App>) -> Result<Self, AppKey> {
        let mut map = HashMap::new();
        for app in apps {
            let key = app.key.clone();
            if map.insert(key.clone(), Arc::new(app)).is_some() {
                return Err(key);
            }
        }
        Ok(Self { apps: Arc::new(map) })
    }

    /// The app of this key, if there is one.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Arc<App>> {
        self.apps.get(key)
    }

    /// All apps, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<App>> {
        self.apps.values()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.apps.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.apps.is_empty()
    }
}
