//! Who is calling: `AppKey`, `Nonce`, `CurTime` and `CheckSum`, as the NIM API signs its calls. Pure: `now` is an argument.
//!
//! `CheckSum` is the lowercase hex SHA1 of AppSecret + Nonce + CurTime. It covers neither the path nor the parameters, so a
//! call that was overheard could be repeated with other content: each check sum is therefore taken once ([`take`]).
//!
//! Once, whatever the content: a repetition that names the same request id is refused too. The official SDKs sign each of their
//! retries anew, under the same request id, and that finds the stored verdict. The pair of Nonce and CurTime is what has to be new;
//! a nonce alone may return, for there are clients that do not care, and nobody can make a check sum of an old one.

use std::time::Duration;

use axum::http::HeaderMap;
use secrecy::{ExposeSecret, SecretString};
use sha1::{Digest, Sha1};
use sha2::Sha256;
use subtle::ConstantTimeEq;

use crate::broadcast::app::AppKey;
use crate::broadcast::request::hex;
use crate::broadcast::verdict::Rejection;
use crate::ledger::{Ledger, LedgerError};

/// The longest `Nonce`, in characters.
pub const MAX_NONCE: usize = 128;

/// The four headers of a signed call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signed<'a> {
    /// `AppKey`.
    pub app_key: &'a str,
    /// `Nonce`: 1 to 128 characters, new for each call.
    pub nonce: &'a str,
    /// `CurTime`: seconds since the Unix epoch, in decimal.
    pub cur_time: &'a str,
    /// `CheckSum`: 40 lowercase hex digits.
    pub check_sum: &'a str,
}

impl<'a> Signed<'a> {
    /// Reads the headers.
    ///
    /// # Errors
    /// A 414, if one is missing, repeated or not printable ASCII.
    pub fn from_headers(headers: &'a HeaderMap) -> Result<Self, Rejection> {
        let one = |name: &'static str| {
            single(headers, name)?.ok_or_else(|| Rejection::bad("bad_signature", format!("header {name} is missing")))
        };
        Ok(Self {
            app_key: one("AppKey")?,
            nonce: one("Nonce")?,
            cur_time: one("CurTime")?,
            check_sum: one("CheckSum")?,
        })
    }

    /// Checks the signature and returns it as what [`take`] remembers.
    ///
    /// `secret`: the app's, `None` if there is no such app, which is answered like a wrong check sum. `now_s`: this server's
    /// clock, seconds since the Unix epoch. `window_s`: how far `CurTime` may be from it, either way.
    ///
    /// # Errors
    /// A 414 with the sentence for the caller.
    pub fn verify(&self, secret: Option<&SecretString>, now_s: u64, window_s: u64) -> Result<CheckSum, Rejection> {
        let nonce_length = self.nonce.chars().count();
        if nonce_length == 0 || nonce_length > MAX_NONCE {
            return Err(Rejection::bad("bad_signature", format!("header Nonce has 1 to {MAX_NONCE} characters")));
        }
        let stale =
            || Rejection::bad("stale_time", format!("CurTime is not within {window_s} s of this server's clock"));
        let digits = self.cur_time.len() <= 12 && self.cur_time.bytes().all(|byte| byte.is_ascii_digit());
        let cur_time: u64 = self.cur_time.parse().ok().filter(|_| digits).ok_or_else(stale)?;
        if cur_time.abs_diff(now_s) > window_s {
            return Err(stale());
        }
        // An unknown app costs the same work, so that the answer's time does not tell which keys exist.
        let expected = digest(secret.map_or("", |secret| secret.expose_secret()), self.nonce, self.cur_time);
        let equal: bool = hex(&expected).as_bytes().ct_eq(self.check_sum.as_bytes()).into();
        if equal && secret.is_some() {
            Ok(CheckSum(expected))
        } else {
            Err(Rejection::bad(
                "bad_signature",
                "AppKey is unknown or CheckSum is wrong: it is the lowercase hex SHA1 of AppSecret + Nonce + CurTime",
            ))
        }
    }
}

/// A header that may be there once at most.
///
/// # Errors
/// A 414, if it is repeated or not printable ASCII.
pub fn single<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<Option<&'a str>, Rejection> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Rejection::bad("bad_signature", format!("header {name} is repeated")));
    }
    let text =
        value.to_str().map_err(|_| Rejection::bad("bad_signature", format!("header {name} is not printable ASCII")))?;
    Ok(Some(text))
}

/// The `CheckSum` of a call, for those who make one.
#[must_use]
pub fn check_sum(secret: &SecretString, nonce: &str, cur_time: &str) -> String {
    hex(&digest(secret.expose_secret(), nonce, cur_time))
}

fn digest(secret: &str, nonce: &str, cur_time: &str) -> [u8; 20] {
    let mut hash = Sha1::new();
    for part in [secret, nonce, cur_time] {
        hash.update(part.as_bytes());
    }
    hash.finalize().into()
}

/// A check sum that was right. Only these are remembered, so that a stranger cannot fill the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckSum([u8; 20]);

/// Takes a check sum, for all processes that share the ledger, until its `CurTime` is surely stale.
///
/// What is remembered is a digest: who reads the ledger learns nothing that could be sent.
///
/// # Errors
/// The ledger's, if it cannot say; nobody may then be let in.
pub async fn take(ledger: &dyn Ledger, app: &AppKey, sum: CheckSum, window_s: u64) -> Result<bool, LedgerError> {
    // CurTime may lie a window ahead, and is good for a window after that; and a little, for clocks that differ.
    let time = Duration::from_secs(window_s.saturating_mul(2).saturating_add(60));
    ledger.first_use(app, &hex(&Sha256::digest(sum.0)[..16]), time).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: u64 = 1_764_000_000;

    fn secret() -> SecretString {
        "demo-secret".into()
    }

    #[test]
    fn a_known_value() {
        // printf %s demo-secretabc1764000000 | sha1sum
        assert_eq!(check_sum(&secret(), "abc", "1764000000"), "257001c3bbaa6f4f3027dd0a193a0aef7fe92943");
    }

    proptest! {
        #[test]
        fn what_is_signed_is_accepted_and_any_change_is_not(
            nonce in "[!-~]{1,128}", off in -300i64..=300, flip in 0usize..40, other in "[!-~]{1,128}",
        ) {
            let cur_time = NOW.saturating_add_signed(off).to_string();
            let sum = check_sum(&secret(), &nonce, &cur_time);
            let signed = Signed { app_key: "demo", nonce: &nonce, cur_time: &cur_time, check_sum: &sum };
            prop_assert!(signed.verify(Some(&secret()), NOW, 300).is_ok());
            prop_assert!(signed.verify(Some(&"other".into()), NOW, 300).is_err());
            let mut wrong = sum.clone().into_bytes();
            wrong[flip] = if wrong[flip] == b'0' { b'1' } else { b'0' };
            let wrong = String::from_utf8(wrong).unwrap();
            let changed = Signed { check_sum: &wrong, ..signed };
            prop_assert!(changed.verify(Some(&secret()), NOW, 300).is_err());
            if other != nonce {
                let changed = Signed { nonce: &other, ..signed };
                prop_assert!(changed.verify(Some(&secret()), NOW, 300).is_err());
            }
        }

        #[test]
        fn foreign_text_never_panics(nonce in ".*", cur_time in ".*", sum in ".*") {
            let signed = Signed { app_key: "demo", nonce: &nonce, cur_time: &cur_time, check_sum: &sum };
            prop_assert!(signed.verify(Some(&secret()), NOW, 300).is_err());
        }
    }

    #[test]
    fn stale_times_long_nonces_and_capitals_are_refused() {
        let check = |nonce: &str, cur_time: &str, upper: bool| {
            let mut sum = check_sum(&secret(), nonce, cur_time);
            if upper {
                sum = sum.to_uppercase();
            }
            Signed { app_key: "demo", nonce, cur_time, check_sum: &sum }.verify(Some(&secret()), NOW, 300).map(|_| ())
        };
        let now = NOW.to_string();
        assert!(check("n", &now, false).is_ok());
        assert!(check("n", &(NOW - 301).to_string(), false).is_err());
        assert!(check("n", &(NOW + 301).to_string(), false).is_err());
        assert!(check("n", &format!("+{now}"), false).is_err());
        assert!(check("n", &format!("{now}000"), false).is_err());
        assert!(check("n", "", false).is_err());
        assert!(check("", &now, false).is_err());
        assert!(check(&"n".repeat(129), &now, false).is_err());
        assert!(check("nonce", &now, true).is_err());
    }

    #[test]
    fn an_unknown_app_is_answered_like_a_wrong_check_sum() {
        let now = NOW.to_string();
        let empty = check_sum(&"".into(), "n", &now);
        let signed = Signed { app_key: "demo", nonce: "n", cur_time: &now, check_sum: &empty };
        let unknown = signed.verify(None, NOW, 300).unwrap_err();
        assert_eq!(unknown, signed.verify(Some(&secret()), NOW, 300).unwrap_err());
    }
}
