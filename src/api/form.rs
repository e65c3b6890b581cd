//! `application/x-www-form-urlencoded`, read strictly: what is ambiguous is refused, not guessed.

use std::collections::HashMap;

use crate::broadcast::verdict::Rejection;

/// The parameters of a call, each there once.
#[derive(Debug, Default)]
pub struct Form {
    values: HashMap<String, String>,
}

impl Form {
    /// Reads a body.
    ///
    /// `content_type`: the header; it may be missing if the body is empty. `known`: the parameters that the call has;
    /// another one is refused, since a misspelt `isOffline` would otherwise change what is sent without a word.
    ///
    /// # Errors
    /// A 414 with the sentence for the caller.
    pub fn parse(content_type: Option<&str>, body: &[u8], known: &'static [&'static str]) -> Result<Self, Rejection> {
        if !(body.is_empty() && content_type.is_none()) {
            check_content_type(content_type.unwrap_or_default())?;
        }
        let mut values = HashMap::new();
        for pair in body.split(|byte| *byte == b'&').filter(|pair| !pair.is_empty()) {
            let (name, value) = match pair.iter().position(|byte| *byte == b'=') {
                Some(at) => (&pair[..at], &pair[at + 1..]),
                None => (pair, &[][..]),
            };
            let name = decode(name).ok().filter(|name| known.contains(&name.as_str())).ok_or_else(|| {
                Rejection::bad("unknown_parameter", format!("the parameters of this call are {}", known.join(", ")))
            })?;
            let value = decode(value).map_err(|problem| Rejection::bad("bad_form", format!("{name}: {problem}")))?;
            if values.contains_key(&name) {
                return Err(Rejection::bad("repeated_parameter", format!("{name} is given twice")));
            }
            values.insert(name, value);
        }
        Ok(Self { values })
    }

    /// Takes a parameter out; `None` if it was not given. An empty one counts as given.
    pub fn take(&mut self, name: &str) -> Option<String> {
        self.values.remove(name)
    }

    /// Takes a parameter out that is a whole number; empty counts as not given, as SDKs send it.
    ///
    /// # Errors
    /// A 414, if it is something else.
    pub fn take_number(&mut self, name: &str) -> Result<Option<i64>, Rejection> {
        match self.take(name).filter(|text| !text.is_empty()) {
            None => Ok(None),
            Some(text) => {
                let bad = || Rejection::bad("bad_field", format!("{name} is a whole number"));
                Ok(Some(text.parse().map_err(|_| bad())?))
            }
        }
    }

    /// Takes a parameter out that is `true` or `false` (or `1`, `0`); empty counts as not given.
    ///
    /// # Errors
    /// A 414, if it is something else.
    pub fn take_bool(&mut self, name: &str) -> Result<Option<bool>, Rejection> {
        match self.take(name).as_deref() {
            None | Some("") => Ok(None),
            Some("true" | "1") => Ok(Some(true)),
            Some("false" | "0") => Ok(Some(false)),
            Some(_) => Err(Rejection::bad("bad_field", format!("{name} is true or false"))),
        }
    }
}

fn check_content_type(content_type: &str) -> Result<(), Rejection> {
    let mut parts = content_type.split(';').map(str::trim);
    let form = parts.next().is_some_and(|kind| kind.eq_ignore_ascii_case("application/x-www-form-urlencoded"));
    let utf8 = parts.filter(|part| !part.is_empty()).all(|part| {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        !name.trim().eq_ignore_ascii_case("charset") || value.trim().trim_matches('"').eq_ignore_ascii_case("utf-8")
    });
    if form && utf8 {
        return Ok(());
    }
    Err(Rejection::bad("bad_content_type", "Content-Type is application/x-www-form-urlencoded;charset=utf-8"))
}

fn decode(text: &[u8]) -> Result<String, &'static str> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.iter();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digit = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
                match (digit(rest.next()), digit(rest.next())) {
                    // Two hex digits are below 256.
                    (Some(high), Some(low)) => (high * 16 + low) as u8,
                    _ => return Err("a % is followed by two hex digits; a % itself is written %25"),
                }
            }
            other => *other,
        });
    }
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TYPE: Option<&str> = Some("application/x-www-form-urlencoded; charset=UTF-8");
    const KNOWN: &[&str] = &["body", "from", "ttl", "isOffline"];

    fn reason(content_type: Option<&str>, body: &[u8]) -> &'static str {
        Form::parse(content_type, body, KNOWN).unwrap_err().reason
    }

    proptest! {
        #[test]
        fn any_text_survives(body in ".*") {
            let encoded = serde_urlencoded::to_string([("body", &body)]).unwrap();
            let mut form = Form::parse(TYPE, encoded.as_bytes(), KNOWN).unwrap();
            prop_assert_eq!(form.take("body").unwrap(), body);
        }

        #[test]
        fn foreign_bytes_never_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Form::parse(TYPE, &body, KNOWN);
        }
    }

    #[test]
    fn what_is_ambiguous_is_refused() {
        assert_eq!(reason(TYPE, b"body=a&body=b"), "repeated_parameter");
        assert_eq!(reason(TYPE, b"body=a&b%6fdy=b"), "repeated_parameter");
        assert_eq!(reason(TYPE, b"body=%ff"), "bad_form");
        assert_eq!(reason(TYPE, b"body=\xff"), "bad_form");
        assert_eq!(reason(TYPE, b"body=100%"), "bad_form");
        assert_eq!(reason(TYPE, b"body=%+1"), "bad_form");
        assert_eq!(reason(TYPE, b"isofline=true"), "unknown_parameter");
        assert_eq!(reason(None, b"body=a"), "bad_content_type");
        assert_eq!(reason(Some("application/json"), b"{}"), "bad_content_type");
        assert_eq!(reason(Some("application/x-www-form-urlencoded; charset=gbk"), b"body=a"), "bad_content_type");
    }

    #[test]
    fn values_are_typed() {
        let mut form = Form::parse(TYPE, b"ttl=&isOffline=1&from=", KNOWN).unwrap();
        assert_eq!(form.take_number("ttl"), Ok(None));
        assert_eq!(form.take_bool("isOffline"), Ok(Some(true)));
        assert_eq!(form.take("from").as_deref(), Some(""));
        let mut form = Form::parse(TYPE, b"ttl=1.5&isOffline=yes", KNOWN).unwrap();
        assert!(form.take_number("ttl").is_err());
        assert!(form.take_bool("isOffline").is_err());
        assert!(Form::parse(None, b"", KNOWN).is_ok());
    }
}
