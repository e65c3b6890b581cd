//! Where replies may go. `reply_to` is whatever the sender wrote, and the worker may publish to every queue of its vhost: so it
//! is the worker that must not be made to fill its own queues, or somebody else's.

use serde::{Deserialize, Deserializer};

use super::Worker;

/// What names made by the broker for direct reply-to begin with.
const PREFIX: &str = "amq.rabbitmq.reply-to";
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
    if name.starts_with(PREFIX) { Node::of(name).is_some() } else { worker.settings.allowed_reply_queues.allow(name) }
}

/// A node of the broker, as the names tell it: a hash of its own name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Node(u32);

impl Node {
    /// The node of a name as brokers from 3.10 on make them, `None` for any other: `PREFIX.<pid>.<key>` in base64, where the pid
    /// is an Erlang term whose node is written `reply@<hash>`. Strict: 3.10 cannot read anything else, and ends the connection.
    pub(super) fn of(name: &str) -> Option<Self> {
        let (pid, key) = name.strip_prefix(PREFIX)?.strip_prefix('.')?.split_once('.')?;
        if decode(key)?.len() != 16 {
            return None;
        }
        let pid = decode(pid)?;
        // 131: a term. 88 and 103: a pid with three numbers behind its node, the last of them of 4 bytes or of 1.
        let (numbers, rest) = match pid.as_slice() {
            [131, 88, rest @ ..] => (12, rest),
            [131, 103, rest @ ..] => (9, rest),
            _ => return None,
        };
        // 118 and 119: an atom in UTF-8, its length in 2 bytes or in 1.
        let (length, rest) = match rest {
            [118, high, low, rest @ ..] => (u16::from_be_bytes([*high, *low]).into(), rest),
            [119, length, rest @ ..] => (usize::from(*length), rest),
            _ => return None,
        };
        let (node, rest) = rest.split_at_checked(length)?;
        let hash = std::str::from_utf8(node).ok()?.strip_prefix("reply@")?;
        let is_number = hash.bytes().all(|byte| byte.is_ascii_digit()) && (hash == "0" || !hash.starts_with('0'));
        // Erlang's phash2 has 27 bits.
        let hash: u32 = hash.parse().ok().filter(|hash| is_number && *hash < 1 << 27)?;
        (rest.len() == numbers).then_some(Self(hash))
    }
}

fn decode(text: &str) -> Option<Vec<u8>> {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.decode(text).ok()
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

    fn direct(pid: &[u8], key: &[u8]) -> String {
        use base64::Engine;
        let encode = |bytes| base64::engine::general_purpose::STANDARD.encode(bytes);
        format!("{PREFIX}.{}.{}", encode(pid), encode(key))
    }

    /// As RabbitMQ 3.10 to 4.2 make them: here 131, 88, 118, 0, 14, the node, three numbers; and the forms that older Erlang writes.
    fn pid(head: &[u8], node: &str, numbers: usize) -> Vec<u8> {
        let mut pid = head.to_vec();
        pid.push(u8::try_from(node.len()).unwrap());
        pid.extend(node.bytes());
        pid.resize(pid.len() + numbers, 7);
        pid
    }

    #[test]
    fn a_name_as_the_broker_makes_them_tells_its_node() {
        let real = direct(&pid(&[131, 88, 118, 0], "reply@77107028", 12), &[7; 16]);
        assert_eq!(Node::of(&real), Some(Node(77_107_028)));
        let short = direct(&pid(&[131, 88, 119], "reply@0", 12), &[7; 16]);
        let old = direct(&pid(&[131, 103, 118, 0], "reply@1", 9), &[7; 16]);
        assert_eq!((Node::of(&short), Node::of(&old)), (Some(Node(0)), Some(Node(1))));
    }

    #[test]
    fn a_made_up_direct_reply_to_is_none() {
        let key = [7; 16];
        for (why, name) in [
            ("no pid", PREFIX.to_owned()),
            ("no key", format!("{PREFIX}.x")),
            ("no base64", format!("{PREFIX}.!!.x")),
            ("base64 of nothing", format!("{PREFIX}.{0}.{0}", "A".repeat(16))),
            ("an atom in Latin-1, which 3.10 cannot read", direct(&pid(&[131, 88, 100, 0], "reply@1", 12), &key)),
            ("another term", direct(&pid(&[131, 87, 118, 0], "reply@1", 12), &key)),
            ("a number short", direct(&pid(&[131, 88, 118, 0], "reply@1", 8), &key)),
            ("a byte more", direct(&pid(&[131, 88, 118, 0], "reply@1", 13), &key)),
            ("a length past the end", direct(&[131, 88, 118, 255, 255, b'r'], &key)),
            ("another node name", direct(&pid(&[131, 88, 118, 0], "rabbit@host", 12), &key)),
            ("no number", direct(&pid(&[131, 88, 118, 0], "reply@", 12), &key)),
            ("a sign", direct(&pid(&[131, 88, 118, 0], "reply@+1", 12), &key)),
            ("a second spelling", direct(&pid(&[131, 88, 118, 0], "reply@01", 12), &key)),
            ("no hash of 27 bits", direct(&pid(&[131, 88, 118, 0], "reply@134217728", 12), &key)),
            ("a short key", direct(&pid(&[131, 88, 118, 0], "reply@1", 12), &key[1..])),
        ] {
            assert_eq!(Node::of(&name), None, "{why}");
        }
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
