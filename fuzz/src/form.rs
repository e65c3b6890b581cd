//! A signed call: header lines, an empty line, the body. The `CheckSum` `sign` is replaced by the right one, which no fuzzer
//! would find.

use std::collections::BTreeMap;

use broadcastd::api::nim::Call;
use broadcastd::api::signature::{MAX_NONCE, Signed, check_sum};
use broadcastd::fuzzing;

use super::{DIRECTORY, SECRET, check_rejection, check_request};

const NOW_S: u64 = 1_764_000_000;
const WINDOW_S: u64 = 300;

/// Every parameter that a call knows.
const NAMES: [&str; 11] = [
    "body",
    "from",
    "isOffline",
    "ttl",
    "ttlSeconds",
    "targetOs",
    "requestId",
    "dedupeSeconds",
    "broadcastId",
    "limit",
    "type",
];

pub fn run(data: &[u8]) {
    let end = data.windows(2).position(|pair| pair == b"\n\n");
    let (lines, body) = end.map_or((data, &[][..]), |at| (&data[..at], &data[at + 2..]));
    let mut headers = fuzzing::headers(lines);
    if let Ok(Signed { nonce, cur_time, check_sum: "sign", .. }) = Signed::from_headers(&headers) {
        let sum = check_sum(&SECRET.into(), nonce, cur_time).parse().expect("hex digits");
        headers.insert("checksum", sum);
    }
    match Signed::from_headers(&headers) {
        Err(rejection) => check_rejection(&rejection),
        Ok(signed) => check_signature(signed),
    }
    for call in Call::ALL {
        let mut form = match fuzzing::form(&headers, body, call) {
            Ok(form) => form,
            Err(rejection) => {
                check_rejection(&rejection);
                continue;
            }
        };
        // The lenient reader of the same format agrees with whatever the strict one takes.
        let pairs: Vec<(String, String)> = serde_urlencoded::from_bytes(body).expect("lenient");
        let known: BTreeMap<String, String> = pairs.iter().cloned().collect();
        assert_eq!(known.len(), pairs.len(), "none is repeated");
        if call == Call::Broadcast {
            let again = fuzzing::form(&headers, body, call).expect("it was read");
            let app = DIRECTORY.get("demo").expect("there is one");
            match fuzzing::request(app, &headers, again) {
                Ok(request) => {
                    check_request(&request);
                    assert_eq!(Some(&request.body), known.get("body"));
                    if let Some(id) = known.get("requestId").filter(|id| !id.is_empty()) {
                        assert_eq!(&request.id, id);
                    }
                }
                Err(rejection) => check_rejection(&rejection),
            }
        }
        for name in NAMES {
            assert_eq!(form.take(name).as_ref(), known.get(name));
        }
        assert!(known.keys().all(|name| NAMES.contains(&name.as_str())));
    }
}

fn check_signature(signed: Signed<'_>) {
    let app = DIRECTORY.get(signed.app_key);
    match signed.verify(app.map(|app| &app.secret), NOW_S, WINDOW_S) {
        Err(rejection) => check_rejection(&rejection),
        Ok(_) => {
            let app = app.expect("an unknown app is refused");
            assert!((1..=MAX_NONCE).contains(&signed.nonce.len()));
            let cur_time: u64 = signed.cur_time.parse().expect("digits");
            assert!(signed.cur_time.bytes().all(|byte| byte.is_ascii_digit()) && cur_time.abs_diff(NOW_S) <= WINDOW_S);
            assert_eq!(signed.check_sum, check_sum(&app.secret, signed.nonce, signed.cur_time));
            assert!(signed.verify(Some(&"another".into()), NOW_S, WINDOW_S).is_err());
            assert!(signed.verify(Some(&app.secret), cur_time + WINDOW_S + 1, WINDOW_S).is_err());
        }
    }
}
