//! A delivery as it comes in: read, checked, its app looked up.

use lapin::message::Delivery;
use lapin::protocol::basic::AMQPProperties;
use lapin::types::{AMQPValue, DeliveryTag, ShortString};

use super::{Worker, reply_to};
use crate::broadcast::app::Directory;
use crate::broadcast::request::{MAX_REQUEST_BYTES, Request, Submission};
use crate::broadcast::verdict::{Rejection, Verdict};

/// The header that the API sets: when it enqueued the request, milliseconds since the Unix epoch.
const ENQUEUED_AT: &str = "x-enqueued-at-ms";

/// One delivery on its way to being settled. It holds what a dead letter needs, so that nothing is lost.
pub(crate) struct Item {
    pub(crate) tag: DeliveryTag,
    pub(crate) reply_to: Option<ShortString>,
    pub(crate) correlation_id: Option<ShortString>,
    pub(crate) properties: AMQPProperties,
    /// What was sent; of more than [`MAX_REQUEST_BYTES`] only so much.
    pub(crate) payload: Vec<u8>,
    /// How much was sent, bytes.
    pub(crate) size: usize,
    /// What was asked, where it could be read.
    pub(crate) request: Option<Request>,
    /// When it was enqueued, by the sender's clock, milliseconds since the Unix epoch.
    pub(crate) enqueued_at_ms: Option<u64>,
}

/// What intake makes of a delivery: a submission for the ledger, or a verdict already.
///
/// `may_reply`: whether a reply may go to this queue.
pub(crate) fn read(
    delivery: Delivery,
    directory: &Directory,
    may_reply: impl Fn(&str) -> bool,
) -> (Item, Result<Submission, Verdict>) {
    let Delivery { delivery_tag, properties, mut data, .. } = delivery;
    let message_id = properties.message_id().as_ref().map(ShortString::as_str);
    let read = Request::from_json(&data, message_id);
    let size = data.len();
    if size > MAX_REQUEST_BYTES {
        // Let go at once: hundreds of them held, each copied into its dead letter, would be gigabytes.
        data.truncate(MAX_REQUEST_BYTES);
        data.shrink_to_fit();
    }
    let mut item = Item {
        tag: delivery_tag,
        reply_to: properties.reply_to().clone().filter(|reply_to| may_reply(reply_to.as_str())),
        correlation_id: properties.correlation_id().clone(),
        enqueued_at_ms: enqueued_at(&properties),
        properties,
        payload: data,
        size,
        request: None,
    };
    let rejected = |rejection: Rejection| Err(Verdict::Rejected(rejection));
    let outcome = match read.map(|request| Submission::new(request, directory)) {
        Err(rejection) => rejected(rejection),
        Ok(Err((request, rejection))) => {
            item.request = Some(*request);
            rejected(rejection)
        }
        Ok(Ok(submission)) => Ok(submission),
    };
    (item, outcome)
}

/// Whether there is anybody to tell the verdict. Where a reply may not go, the request is one without a reply.
pub(super) fn may_reply(worker: &Worker, reply_to: &str) -> bool {
    let allowed = reply_to::is_allowed(worker, reply_to);
    if !reply_to.is_empty() && !allowed {
        worker.metrics.replies_lost.with_label_values(&["bad_reply_to"]).inc();
    }
    !reply_to.is_empty() && allowed
}

fn enqueued_at(properties: &AMQPProperties) -> Option<u64> {
    let header = properties.headers().as_ref().and_then(|headers| headers.inner().get(ENQUEUED_AT));
    match header {
        Some(AMQPValue::LongLongInt(ms)) => u64::try_from(*ms).ok(),
        Some(AMQPValue::Timestamp(ms)) => Some(*ms),
        _ => properties.timestamp().map(|seconds| seconds.saturating_mul(1000)),
    }
}
