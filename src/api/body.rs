//! Reading a call's body, bounded in bytes and time.

use std::time::Duration;

use axum::body::Body;
use axum::http::HeaderMap;
use axum::http::header::CONTENT_LENGTH;
use futures_util::StreamExt;

use crate::broadcast::verdict::Rejection;

/// How long a body may take to arrive.
const ARRIVAL: Duration = Duration::from_secs(10);

/// Of a body that is too large, so much is still read and thrown away: a client that is cut off while it sends does not
/// see the answer.
const DISCARDED: usize = 17 * 1024 * 1024;

/// Reads at most `most` bytes.
///
/// # Errors
/// A 414, if there are more, or if it does not arrive whole and in time.
pub async fn read(headers: &HeaderMap, body: Body, most: usize) -> Result<Vec<u8>, Rejection> {
    let declared = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if declared.is_some_and(|length| length > most.saturating_add(DISCARDED)) {
        return Err(too_large(most));
    }
    let collect = async {
        let mut stream = body.into_data_stream();
        let mut bytes = Vec::with_capacity(declared.unwrap_or(0).min(most));
        let mut length = 0usize;
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|_| Rejection::bad("body_cut", "the body did not arrive whole"))?;
            length = length.saturating_add(chunk.len());
            if length <= most {
                bytes.extend_from_slice(&chunk);
            } else if length > most.saturating_add(DISCARDED) {
                break;
            }
        }
        if length > most { Err(too_large(most)) } else { Ok(bytes) }
    };
    tokio::time::timeout(ARRIVAL, collect)
        .await
        .unwrap_or_else(|_| Err(Rejection::bad("body_slow", "the body did not arrive in 10 s")))
}

fn too_large(most: usize) -> Rejection {
    Rejection::bad("too_large", format!("the body has more than {most} bytes"))
}
