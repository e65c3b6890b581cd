//! A device's login: the first line is the claims of a token (which is signed for the fuzzer, with the app's secret), the
//! rest is the message, in which `TOKEN` stands for it.

use std::sync::LazyLock;

use broadcastd::broadcast::MAX_ID;
use broadcastd::fuzzing::{Apps, sign_claims};

use super::{DIRECTORY, SECRET, split_once};

static APPS: LazyLock<Apps> = LazyLock::new(|| Apps::new(&DIRECTORY, false));

pub fn run(data: &[u8]) {
    let (claims, message) = split_once(data, b'\n');
    let Ok(message) = std::str::from_utf8(message) else { return };
    let claims: serde_json::Value = serde_json::from_slice(claims).unwrap_or_default();
    let signed = sign_claims(&claims, SECRET).unwrap_or_default();
    let text = message.replace("TOKEN", &signed);
    let login = match APPS.check(&text) {
        Ok(login) => login,
        Err(refused) => {
            assert!(matches!(refused.code, 403 | 414));
            assert!(refused.desc.len() < 200, "the error and its close are one frame");
            return;
        }
    };
    // Read once more by a reader that knows nothing of logins.
    let json: serde_json::Value = serde_json::from_str(&text).expect("it was read");
    let string = |name: &str| json[name].as_str().expect("a string");
    assert_eq!(string("type"), "login");
    assert!((1..=128).contains(&string("account").len()) && (1..=128).contains(&string("device").len()));
    assert_eq!(string("platform"), login.platform.name());
    assert_eq!(APPS.find(string("app")), Some(login.app));
    assert_eq!(json["since"].as_u64().unwrap_or(0), login.since);
    assert!(login.since <= MAX_ID);
    // Only a token that was signed comes in, and only for whom and until when it says.
    assert_eq!(string("token"), signed);
    assert_eq!(claims["sub"].as_str(), Some(string("account")));
    let audience = &claims["aud"];
    let audiences = audience.as_array().map_or(std::slice::from_ref(audience), Vec::as_slice);
    assert!(audiences.iter().any(|audience| audience.as_str() == Some(string("app"))));
    assert!(claims["exp"].as_f64().is_some_and(|exp| exp > 1_764_000_000.0));
}
