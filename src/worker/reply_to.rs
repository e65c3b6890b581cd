//! Where replies may go. `reply_to` is whatever the sender wrote, and the worker may publish to every queue of its vhost: so it
//! is the worker that must not be made to fill its own queues, or somebody else's.

use serde::{Deserialize, Deserializer};

use super::Worker;

/// What names made by the broker for direct reply-to begin with.
const DIRECT: &str = "amq.rabbitmq.reply-to";
/// The most patterns.
const MOST: usize = 100;

/// Patterns of queue names; `*` stands for any characters. In the settings a list, or one text with commas (environment, flags).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplyQueues(Vec<String>);

impl<'de> Deserialize<'de> for ReplyQueues {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            List(Vec<String>),
            Text(String),
        }
        Ok(Self(match Written::deserialize(deserializer)? {
            Written::List(list) => list,
            Written::Text(text) => {
                text.split(',').map(|one| one.trim().to_owned()).filter(|one| !one.is_empty()).collect()
            }
        }))
    }
}

impl ReplyQueues {
    /// Checks the patterns.
    ///
    /// # Errors
    /// A sentence.
    pub fn validate(&self) -> Result<(), String> {
        let usable = |pattern: &String| !pattern.is_empty() && pattern.len() <= 255;
        if self.0.len() > MOST || !self.0.iter().all(usable) {
            return Err(format!("worker.allowed_reply_queues is at most {MOST} patterns of 1 to 255 bytes"));
        }
        Ok(())
    }

    fn allow(&self, name: &str) -> bool {
        self.0.iter().any(|pattern| matches(pattern, name))
    }
}

/// Whether a reply may be sent to this queue.
///
/// Names that the broker made for direct reply-to are always allowed: they lead to nobody but their maker. The worker's own
/// queues never are, whatever the settings say.
pub(super) fn is_allowed(worker: &Worker, name: &str) -> bool {
    let amqp = &worker.amqp;
    if name == amqp.queue || name == amqp.dead_letter {
        return false;
    }
    if name.starts_with(DIRECT) { is_direct(name) } else { worker.settings.allowed_reply_queues.allow(name) }
}

/// Whether it is a direct reply-to name as the broker makes them. Versions up to 3.10 close the connection over one that is not
/// one of theirs.
fn is_direct(name: &str) -> bool {
    let is_base64 = |part: &str| {
        part.len() >= 16
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/' | b'=' | b'-' | b'_'))
    };
    let direct =
        name.strip_prefix(DIRECT).and_then(|rest| rest.strip_prefix('.')).and_then(|rest| rest.split_once('.'));
    direct.is_some_and(|(a, b)| is_base64(a) && is_base64(b))
}

/// Each text between two stars is looked for after the one before: as many steps as the name has bytes, times the stars.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(first) else { return false };
    let (middle, last) = rest.rsplit_once('*').unwrap_or(("", rest));
    for part in middle.split('*') {
        let Some(at) = name.find(part) else { return false };
        name = &name[at + part.len()..];
    }
    name.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_made_up_direct_reply_to_is_not_answered() {
        assert!(is_direct("amq.rabbitmq.reply-to.g1h2AA5yZXB1111A0NzA4.AAAC9QAAAAAVgEsA6Q=="));
        assert!(!is_direct("amq.rabbitmq.reply-to.!!.x") && !is_direct("amq.rabbitmq.reply-to"));
    }

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, expected) in [
            ("*", "anything", true),
            ("*", "", true),
            ("replies", "replies", true),
            ("replies", "replies2", false),
            ("replies", "my.replies", false),
            ("replies.*", "replies.shop", true),
            ("replies.*", "replies", false),
            ("*.replies", "shop.replies", true),
            ("a*b*c", "a-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("ab*bc", "abc", false),
            ("**", "x", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    proptest! {
        #[test]
        fn it_matches_as_a_plain_recursion_does(pattern in "[ab*]{0,8}", name in "[ab]{0,10}") {
            fn plain(pattern: &[u8], name: &[u8]) -> bool {
                match pattern.split_first() {
                    None => name.is_empty(),
                    Some((b'*', rest)) => (0..=name.len()).any(|skip| plain(rest, &name[skip..])),
                    Some((byte, rest)) => name.first() == Some(byte) && plain(rest, &name[1..]),
                }
            }
            prop_assert_eq!(matches(&pattern, &name), plain(pattern.as_bytes(), name.as_bytes()));
        }
    }

    #[test]
    fn settings_are_a_list_or_a_text() {
        let read = |json: &str| serde_json::from_str::<ReplyQueues>(json).unwrap();
        assert_eq!(read(r#"["a", "b.*"]"#), read(r#""a, b.*""#));
        assert_eq!(read(r#""""#), read("[]"));
        assert!(read("[]").validate().is_ok() && !read("[]").allow("a"));
        assert!(read(r#"["a", ""]"#).validate().is_err());
    }
}
