//! What the scripts are given and what they answer, in Redis' types.

use redis::{Cmd, Value};

use super::keys::Key;
use crate::broadcast::MAX_ID;
use crate::broadcast::app::AppKey;
use crate::broadcast::envelope::Envelope;
use crate::broadcast::verdict::{Accepted, Decision, Limit, Refusal};
use crate::ledger::{LedgerError, Stored};

/// `numkeys key… argument…`, behind a placeholder for the command's name.
pub(super) fn arguments<const K: usize, const A: usize>(
    keys: [Key<'_>; K],
    arguments: [impl redis::ToRedisArgs; A],
) -> Cmd {
    let mut command = redis::cmd("-");
    command.arg(K);
    for key in keys {
        command.arg(key);
    }
    for argument in arguments {
        command.arg(argument);
    }
    command
}

pub(crate) fn read<T: redis::FromRedisValue>(value: Value) -> Result<T, LedgerError> {
    redis::from_redis_value(value).map_err(|_| LedgerError::Corrupt("a script gave an unexpected answer".into()))
}

/// Reads row by row: one that cannot be read (by this version) is skipped, loudly, and the others are served.
pub(super) fn stored(app: &AppKey, raw: Vec<Vec<u8>>) -> Vec<Stored> {
    let rows = raw.into_iter().filter_map(|raw| match Envelope::read(&raw) {
        Ok(envelope) => Some(Stored { raw: raw.into(), envelope }),
        Err(error) => {
            tracing::error!(%app, %error, "a stored envelope cannot be read and is skipped");
            None
        }
    });
    rows.collect()
}

pub(super) fn small(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// The answer of accept.lua.
pub(crate) fn read_decision(value: &Value) -> Result<Decision, LedgerError> {
    let unexpected = || LedgerError::Corrupt("the accept script gave an unexpected answer".into());
    let Value::Array(items) = value else { return Err(unexpected()) };
    let mut numbers = [0u64; 7];
    if items.is_empty() || items.len() > numbers.len() {
        return Err(unexpected());
    }
    for (number, item) in numbers.iter_mut().zip(items) {
        let Value::Int(integer) = item else { return Err(unexpected()) };
        *number = u64::try_from(*integer).map_err(|_| unexpected())?;
    }
    match (numbers[0], items.len()) {
        // What lies outside is not the script's, and must not be told to a sender as a verdict.
        (1, 7) if !(1..=MAX_ID).contains(&numbers[1]) || (numbers[3] != 0 && numbers[3] <= numbers[2]) => {
            Err(unexpected())
        }
        (1, 7) => Ok(Decision::Accepted(Accepted {
            id: numbers[1],
            time_ms: numbers[2],
            expires_ms: numbers[3],
            targeted: small(numbers[4]),
            reached: small(numbers[5]),
            repeated: numbers[6] != 0,
        })),
        (2, 1) => Ok(Decision::Conflict),
        (3, 3) if numbers[2] >= 1 => {
            let limit = match numbers[1] {
                1 => Limit::Minute,
                2 => Limit::Day,
                _ => return Err(unexpected()),
            };
            Ok(Decision::Refused(Refusal { limit, retry_after: numbers[2] }))
        }
        _ => Err(unexpected()),
    }
}
