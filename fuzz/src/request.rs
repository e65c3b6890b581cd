//! An AMQP message: the first line holds the properties, separated by tabs (message id, reply-to, correlation id,
//! `x-enqueued-at-ms`, timestamp; empty: not there), the rest is the body.

use broadcastd::broadcast::verdict::Verdict;
use broadcastd::fuzzing::{Properties, take_in};

use super::{DIRECTORY, check_rejection, check_request, split_once};

pub fn run(data: &[u8]) {
    let (line, body) = split_once(data, b'\n');
    let mut fields = line.split(|byte| *byte == b'\t').map(|field| {
        // A short string has at most 255 bytes.
        std::str::from_utf8(field).ok().filter(|text| !text.is_empty() && text.len() <= 255)
    });
    let mut next = || fields.next().flatten();
    let (message_id, reply_to, correlation_id) = (next(), next(), next());
    let enqueued_at_ms = next().and_then(|text| text.parse::<i64>().ok());
    let timestamp = next().and_then(|text| text.parse::<u64>().ok());
    let properties = Properties { message_id, reply_to, correlation_id, enqueued_at_ms, timestamp };

    let taken = take_in(properties, body.to_vec(), &DIRECTORY);
    assert_eq!(taken.payload, body, "the dead letter is the message");
    assert_eq!(taken.reply_to.as_deref(), reply_to);
    match enqueued_at_ms {
        Some(ms) => assert_eq!(taken.enqueued_at_ms, u64::try_from(ms).ok()),
        None => assert_eq!(taken.enqueued_at_ms.is_some(), timestamp.is_some()),
    }
    match &taken.outcome {
        Ok(submission) => {
            let request = &submission.request;
            check_request(request);
            assert_eq!(request.app.as_str(), "demo");
            // Read once more by a reader that knows nothing of requests.
            let json: serde_json::Value = serde_json::from_slice(body).expect("it was read");
            let id = json.get("requestId").and_then(|id| id.as_str()).or(message_id);
            assert_eq!(Some(request.id.as_str()), id);
            assert_eq!(json["body"].as_str(), Some(request.body.as_str()));
            assert_eq!(json["from"].as_str().unwrap_or_default(), request.from);
            assert_eq!(json["isOffline"].as_bool().unwrap_or_default(), request.ttl_ms.is_some());
        }
        Err(Verdict::Rejected(rejection)) => {
            check_rejection(rejection);
            if let Some(request) = &taken.request {
                check_request(request);
                assert_ne!(request.app.as_str(), "demo");
            }
        }
        Err(_) => panic!("only the ledger decides"),
    }
}
