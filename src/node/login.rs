//! Who may connect: the login message and its token.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use secrecy::ExposeSecret;
use serde::Deserialize;

use crate::broadcast::app::{App, AppKey, Directory};
use crate::broadcast::platform::Platform;
use crate::broadcast::verdict::code;
use crate::broadcast::{BroadcastId, MAX_ID};

/// The longest account and device name, in bytes.
const MAX_NAME: usize = 128;

/// An app's place in [`Apps`].
pub type AppIndex = u32;

/// The apps of this node, numbered, with what checks their tokens.
pub struct Apps {
    apps: Vec<(Arc<App>, DecodingKey, Validation)>,
    index: HashMap<AppKey, AppIndex>,
    tokenless: bool,
}

/// A login that is in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Login {
    /// Its app.
    pub app: AppIndex,
    /// The device's platform.
    pub platform: Platform,
    /// The device's cursor: the last id it has had, 0 if it has had none.
    pub since: BroadcastId,
}

/// Why a login is refused. Holds nothing of what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// 403 or 414.
    pub code: u16,
    /// For the device.
    pub desc: &'static str,
}

/// The message. Fields that this version does not know are skipped.
#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    app: Cow<'a, str>,
    #[serde(borrow)]
    account: Cow<'a, str>,
    #[serde(borrow)]
    device: Cow<'a, str>,
    #[serde(borrow)]
    platform: Cow<'a, str>,
    #[serde(borrow)]
    token: Option<Cow<'a, str>>,
    since: Option<BroadcastId>,
}

/// What of a token is looked at; `aud` and `exp` are checked by the library.
#[derive(Deserialize)]
struct Claims {
    sub: String,
}

const fn malformed(desc: &'static str) -> Refused {
    Refused { code: code::BAD_PARAMETER, desc }
}

const fn forbidden(desc: &'static str) -> Refused {
    Refused { code: code::FORBIDDEN, desc }
}

impl Apps {
    /// Numbers the apps of `directory`. `tokenless`: whether a login without a token is taken.
    #[must_use]
    pub fn new(directory: &Directory, tokenless: bool) -> Self {
        let apps: Vec<_> = directory
            .iter()
            .map(|app| {
                let mut validation = Validation::new(Algorithm::HS256);
                validation.set_audience(&[app.key.as_str()]);
                validation.set_required_spec_claims(&["exp", "aud", "sub"]);
                // Whoever makes the tokens chooses how long they hold; nothing is added here.
                validation.leeway = 0;
                validation.validate_nbf = true;
                (app.clone(), DecodingKey::from_secret(app.secret.expose_secret().as_bytes()), validation)
            })
            .collect();
        let index = (0..).zip(&apps).map(|(index, (app, ..))| (app.key.clone(), index)).collect();
        Self { apps, index, tokenless }
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

    /// The app's key.
    #[must_use]
    pub fn key(&self, app: AppIndex) -> Option<&AppKey> {
        self.apps.get(app as usize).map(|(app, ..)| &app.key)
    }

    /// The app of this key.
    #[must_use]
    pub fn find(&self, key: &str) -> Option<AppIndex> {
        self.index.get(key).copied()
    }

    /// Checks a device's first message.
    ///
    /// # Errors
    /// 414 if it is not a login with all its fields, 403 if the app is unknown or the token does not hold.
    pub fn check(&self, text: &str) -> Result<Login, Refused> {
        let message: Message<'_> = serde_json::from_str(text).map_err(|_| {
            malformed(
                "the first message is a login: {\"type\":\"login\",\"app\",\"account\",\"device\",\"platform\",\"token\",\"since\"}",
            )
        })?;
        if message.kind != "login" {
            return Err(malformed("the first message has the type login"));
        }
        if message.account.is_empty() || message.account.len() > MAX_NAME {
            return Err(malformed("account has 1 to 128 bytes"));
        }
        if message.device.is_empty() || message.device.len() > MAX_NAME {
            return Err(malformed("device has 1 to 128 bytes"));
        }
        let platform = Platform::parse(&message.platform).ok_or(malformed("platform is ios, aos, pc, web or mac"))?;
        let since = message.since.unwrap_or(0);
        if since > MAX_ID {
            return Err(malformed("since is the id of a broadcast, or 0"));
        }
        let app = self.find(&message.app).ok_or(forbidden("no such app"))?;
        match &message.token {
            Some(token) => self.check_token(app, token, &message.account)?,
            None if self.tokenless => {}
            None => return Err(malformed("token is missing")),
        }
        Ok(Login { app, platform, since })
    }

    fn check_token(&self, app: AppIndex, token: &str, account: &str) -> Result<(), Refused> {
        let Some((_, key, validation)) = self.apps.get(app as usize) else { return Err(forbidden("no such app")) };
        let token = jsonwebtoken::decode::<Claims>(token, key, validation).map_err(|error| match error.kind() {
            jsonwebtoken::errors::ErrorKind::ExpiredSignature => forbidden("the token has expired"),
            _ => forbidden("the token is not valid for this app"),
        })?;
        if token.claims.sub == account { Ok(()) } else { Err(forbidden("the token is another account's")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::{directory, token};

    fn login(change: &[(&str, serde_json::Value)]) -> String {
        let mut message = serde_json::json!({
            "type": "login", "app": "demo", "account": "ann", "device": "d1", "platform": "web",
            "token": token("demo", "ann", 60), "since": 5, "colour": "unknown to this version",
        });
        for (field, value) in change {
            message[field] = value.clone();
        }
        message.to_string()
    }

    #[test]
    fn a_login_with_a_valid_token_is_taken() {
        let apps = Apps::new(&directory(), false);
        let demo = apps.find("demo").unwrap();
        assert_eq!(apps.check(&login(&[])), Ok(Login { app: demo, platform: Platform::Web, since: 5 }));
        assert_eq!(apps.check(&login(&[("since", ().into())])).unwrap().since, 0);
    }

    #[test]
    fn every_bad_login_has_its_code() {
        let apps = Apps::new(&directory(), false);
        for (field, value, code) in [
            ("type", "logout".into(), 414),
            ("app", 5.into(), 414),
            ("account", "".into(), 414),
            ("device", ().into(), 414),
            ("device", "x".repeat(129).into(), 414),
            ("platform", "symbian".into(), 414),
            ("since", (-1).into(), 414),
            ("since", 1.5.into(), 414),
            ("since", (MAX_ID + 1).into(), 414),
            ("token", ().into(), 414),
            ("app", "nobody".into(), 403),
            ("app", "other".into(), 403),
            ("account", "bob".into(), 403),
            ("token", "x.y.z".into(), 403),
            ("token", token("other", "ann", 60).into(), 403),
            ("token", token("demo", "ann", -5).into(), 403),
        ] {
            assert_eq!(apps.check(&login(&[(field, value)])).unwrap_err().code, code, "{field}");
        }
        for text in ["", "[]", "{}", "\u{0}", &"[".repeat(4000)] {
            assert_eq!(apps.check(text).unwrap_err().code, 414);
        }
        assert_eq!(
            apps.check(&login(&[("token", token("demo", "ann", -5).into())])).unwrap_err().desc,
            "the token has expired"
        );
    }

    #[test]
    fn without_a_token_only_where_that_is_set() {
        let apps = Apps::new(&directory(), true);
        assert!(apps.check(&login(&[("token", ().into())])).is_ok());
        assert_eq!(apps.check(&login(&[("token", "wrong".into())])).unwrap_err().code, 403);
    }

    #[test]
    fn a_token_that_does_not_hold_yet_is_refused() {
        let apps = Apps::new(&directory(), false);
        let now = jsonwebtoken::get_current_timestamp();
        let token = |not_before: u64| {
            let claims = serde_json::json!({ "aud": "demo", "sub": "ann", "exp": now + 120, "nbf": not_before });
            let key = jsonwebtoken::EncodingKey::from_secret(b"demo-secret");
            jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap()
        };
        assert!(apps.check(&login(&[("token", token(now - 1).into())])).is_ok());
        assert_eq!(apps.check(&login(&[("token", token(now + 60).into())])).unwrap_err().code, 403);
    }

    #[test]
    fn a_token_signed_otherwise_is_refused() {
        let apps = Apps::new(&directory(), false);
        // {"alg":"none"} and no signature.
        let unsigned = format!("eyJhbGciOiJub25lIn0.{}.", token("demo", "ann", 60).split('.').nth(1).unwrap());
        assert_eq!(apps.check(&login(&[("token", unsigned.into())])).unwrap_err().code, 403);
    }
}
