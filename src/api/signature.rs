//! Who is calling: `AppKey`, `Nonce`, `CurTime` and `CheckSum`, as the NIM API signs its calls. Pure: `now` is an argument.
//!
//! `CheckSum` is the lowercase hex SHA1 of AppSecret + Nonce + CurTime. It covers neither the path nor the parameters, so a
//! call that was overheard could be repeated with other content: each check sum is therefore taken once ([`Replays`]).

use std::collections::{HashSet, VecDeque};

use axum::http::HeaderMap;
use secrecy::{ExposeSecret, SecretString};
use sha1::{Digest, Sha1};
use subtle::ConstantTimeEq;

use crate::broadcast::request::hex;
use crate::broadcast::verdict::Rejection;

/// The longest `Nonce`, in characters.
pub const MAX_NONCE: usize = 128;

/// How many check sums are remembered; when there are more, the oldest is forgotten, and could be replayed until its
/// `CurTime` is stale. About 12 MB when full.
pub const MAX_REMEMBERED: usize = 200_000;

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

    /// Checks the signature and returns it as what [`Replays`] remembers.
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

/// A check sum that was right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CheckSum([u8; 20]);

/// The check sums that were taken, each until its `CurTime` is surely stale.
///
/// Only right ones get in, so a stranger cannot fill it. It is this process's own: behind a balancer, a call could be
/// replayed once at each replica.
#[derive(Debug)]
pub struct Replays {
    most: usize,
    taken: HashSet<CheckSum>,
    /// By the time from which they may be forgotten, seconds since the Unix epoch; that is the order of arrival.
    order: VecDeque<(u64, CheckSum)>,
}

impl Default for Replays {
    fn default() -> Self {
        Self::new(MAX_REMEMBERED)
    }
}

impl Replays {
    /// Remembers `most` at the most.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { most: most.max(1), taken: HashSet::new(), order: VecDeque::new() }
    }

    /// Takes a check sum.
    ///
    /// # Errors
    /// A 414, if it was taken before.
    pub fn take(&mut self, check_sum: CheckSum, now_s: u64, window_s: u64) -> Result<(), Rejection> {
        while let Some((until, oldest)) = self.order.front().copied() {
            if until > now_s && self.taken.len() < self.most {
                break;
            }
            self.order.pop_front();
            self.taken.remove(&oldest);
        }
        if !self.taken.insert(check_sum) {
            return Err(Rejection::bad("replayed", "this Nonce and CurTime were used before; sign each call anew"));
        }
        // CurTime may lie a window ahead, and is good for a window after that.
        self.order.push_back((now_s.saturating_add(window_s.saturating_mul(2)).saturating_add(1), check_sum));
        Ok(())
    }
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

        #[test]
        fn a_replay_is_refused_for_as_long_as_it_would_verify(steps in proptest::collection::vec((0u8..6, 0u64..200), 1..200)) {
            let mut replays = Replays::new(1000);
            let mut now = NOW;
            let mut taken: std::collections::HashMap<u8, u64> = std::collections::HashMap::new();
            for (sum, pause) in steps {
                now += pause;
                let known = taken.get(&sum).is_some_and(|at| now <= at + 600);
                let refused = replays.take(CheckSum([sum; 20]), now, 300).is_err();
                prop_assert_eq!(refused, known);
                if !refused { taken.insert(sum, now); }
                prop_assert_eq!(replays.order.len(), replays.taken.len());
            }
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

    #[test]
    fn when_full_the_oldest_is_forgotten() {
        let mut replays = Replays::new(2);
        for sum in 0..3u8 {
            replays.take(CheckSum([sum; 20]), NOW, 300).unwrap();
        }
        assert!(replays.take(CheckSum([2; 20]), NOW, 300).is_err());
        assert!(replays.take(CheckSum([0; 20]), NOW, 300).is_ok());
        assert!(replays.taken.len() <= 2);
    }
}
