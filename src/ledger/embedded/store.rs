//! The file: its tables, and how its failures are told.
//!
//! Rows are typed by redb, which refuses a table of another type. App keys and request ids lead the keys, so that what belongs
//! to one app is one range.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use redb::{Builder, Database, DatabaseError, ReadableDatabase, TableDefinition};

use crate::ledger::LedgerError;

/// What the file says of itself: `format` and `generation`.
const FILE: TableDefinition<'_, &str, &str> = TableDefinition::new("file");
/// App → head, entries in the log, generation, the generation before it.
pub(super) const META: TableDefinition<'_, &str, (u64, u64, &str, &str)> = TableDefinition::new("meta");
/// App → `Quota::to_bytes`.
pub(super) const QUOTA: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("quota");
/// App, id → envelope.
pub(super) const LOG: TableDefinition<'_, (&str, u64), &[u8]> = TableDefinition::new("log");
/// App, id → until when it is valid (ms), envelope.
pub(super) const RETAINED: TableDefinition<'_, (&str, u64), (u64, &[u8])> = TableDefinition::new("retained");
/// App, request id → [`RequestRow`].
pub(super) const REQUESTS: TableDefinition<'_, (&str, &str), RequestRow<'static>> = TableDefinition::new("requests");
/// Until when a request id is remembered (ms), app, request id: the order in which they are forgotten.
pub(super) const EXPIRIES: TableDefinition<'_, (u64, &str, &str), ()> = TableDefinition::new("expiries");

/// App, mark → until when its use is remembered (ms).
pub(super) const USED: TableDefinition<'_, (&str, &str), u64> = TableDefinition::new("used");
/// Until when the use of a mark is remembered (ms), app, mark: the order in which they are forgotten.
pub(super) const USED_EXPIRIES: TableDefinition<'_, (u64, &str, &str), ()> = TableDefinition::new("used_expiries");

/// Remembered until (ms), content hash, id, time (ms), valid until (ms, 0 if not retained), nodes targeted, nodes reached.
pub(super) type RequestRow<'a> = (u64, &'a str, u64, u64, u64, u32, u32);

const FORMAT: &str = "1";
/// redb's own default is 1 GiB.
const CACHE_BYTES: usize = 64 << 20;

/// Opens the database, again after a failure.
pub(super) type Opener = Box<dyn FnMut() -> Result<Database, DatabaseError> + Send>;

/// Why the embedded ledger does not start.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// One file belongs to one process.
    #[error("the ledger's file {0} is in use by another process: stop that one, or give this one a file of its own")]
    Locked(PathBuf),
    /// The file cannot be opened, made or read.
    #[error("the ledger's file {path} cannot be used: {reason}")]
    Unusable {
        /// Which file.
        path: PathBuf,
        /// What the system or redb says.
        reason: String,
    },
    /// Another version wrote it.
    #[error("the ledger's file {path} has format {found}, and this version reads format {FORMAT}")]
    Format {
        /// Which file.
        path: PathBuf,
        /// Its format.
        found: String,
    },
}

impl OpenError {
    pub(super) fn new(path: &Path, error: &DatabaseError) -> Self {
        match error {
            DatabaseError::DatabaseAlreadyOpen => Self::Locked(path.into()),
            DatabaseError::Storage(redb::StorageError::Io(error)) => Self::unusable(path, &io_sentence(error)),
            error => Self::unusable(path, error),
        }
    }

    pub(super) fn unusable(path: &Path, reason: &impl ToString) -> Self {
        Self::Unusable { path: path.into(), reason: reason.to_string() }
    }
}

/// Opens a file, made if it is not there.
pub(super) fn file_opener(path: PathBuf) -> Opener {
    Box::new(move || {
        if !path.exists() {
            create(&path)?;
        }
        open(&path)
    })
}

fn open(path: &Path) -> Result<Database, DatabaseError> {
    Builder::new().set_cache_size(CACHE_BYTES).create(path)
}

/// Makes the file under another name first: one that was only half made when its process was killed could not be opened.
fn create(path: &Path) -> Result<(), DatabaseError> {
    let mut draft = path.as_os_str().to_owned();
    draft.push(".new");
    let draft = Path::new(&draft);
    let made = match open(draft) {
        // Half made: its process is gone, or the file would be locked.
        Err(DatabaseError::Storage(redb::StorageError::Io(error))) if error.kind() == ErrorKind::InvalidData => {
            std::fs::remove_file(draft)?;
            open(draft)
        }
        made => made,
    };
    made?.close()?;
    // Unlike a rename, a link never replaces what another process has made meanwhile.
    match std::fs::hard_link(draft, path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => std::fs::rename(draft, path)?,
        _ => std::fs::remove_file(draft)?,
    }
    // A name is durable only when its folder is.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(std::fs::File::open(folder)?.sync_all()?)
}

/// Opens memory, once: opened again it would be empty, and pretend that nothing had been accepted.
pub(super) fn memory_opener() -> Opener {
    let mut opened = false;
    Box::new(move || {
        if std::mem::replace(&mut opened, true) {
            return Err(redb::StorageError::DatabaseClosed.into());
        }
        Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(redb::backends::InMemoryBackend::new())
    })
}

/// Makes the tables of a new file, checks an existing one; returns its generation, or the other format that it has.
pub(super) fn prepare(database: &Database) -> Result<Result<String, String>, Failure> {
    if let Some(found) = described(database)? {
        return Ok(found);
    }
    let transaction = database.begin_write()?;
    let generation = uuid::Uuid::new_v4().to_string();
    {
        let mut file = transaction.open_table(FILE)?;
        file.insert("format", FORMAT)?;
        file.insert("generation", generation.as_str())?;
        // Made here, so that a reader finds them before the first write.
        transaction.open_table(META)?;
        transaction.open_table(QUOTA)?;
        transaction.open_table(LOG)?;
        transaction.open_table(RETAINED)?;
        transaction.open_table(REQUESTS)?;
        transaction.open_table(EXPIRIES)?;
    }
    transaction.commit()?;
    Ok(Ok(generation))
}

fn described(database: &Database) -> Result<Option<Result<String, String>>, Failure> {
    let file = match database.begin_read()?.open_table(FILE) {
        Ok(file) => file,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let format = file.get("format")?.map(|row| row.value().to_owned()).unwrap_or_default();
    let generation = file.get("generation")?.map(|row| row.value().to_owned()).unwrap_or_default();
    Ok(Some(if format == FORMAT { Ok(generation) } else { Err(format) }))
}

/// Commits something small, to see whether the disk takes it.
pub(super) fn probe(database: &Database) -> Result<(), Failure> {
    let transaction = database.begin_write()?;
    transaction.open_table(FILE)?.insert("format", FORMAT)?;
    Ok(transaction.commit()?)
}

/// Why a read or a transaction failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// One row is not what this version writes; the others are none the worse.
    #[error("{0}")]
    Row(String),
    /// The file, and with it the whole transaction.
    #[error("{}", sentence(.0))]
    Storage(redb::Error),
    /// It is not open at the moment.
    #[error("{0}")]
    Closed(String),
}

macro_rules! storage_failures {
    ($($error:ty),+) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::Storage(error.into())
            }
        })+
    };
}
storage_failures!(redb::StorageError, redb::TableError, redb::TransactionError, redb::CommitError);

impl From<&Failure> for LedgerError {
    fn from(failure: &Failure) -> Self {
        match failure {
            Failure::Row(_)
            | Failure::Storage(
                redb::Error::Corrupted(_)
                | redb::Error::TableTypeMismatch { .. }
                | redb::Error::TypeDefinitionChanged { .. },
            ) => Self::Corrupt(failure.to_string()),
            _ => Self::Unavailable(failure.to_string()),
        }
    }
}

fn sentence(error: &redb::Error) -> String {
    match error {
        redb::Error::Io(error) => io_sentence(error),
        redb::Error::PreviousIo | redb::Error::DatabaseClosed => "the ledger's file is being reopened".to_owned(),
        error => error.to_string(),
    }
}

fn io_sentence(error: &std::io::Error) -> String {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "the disk with the ledger's file is full".to_owned(),
        ErrorKind::FileTooLarge => "the ledger's file has reached the limit on the size of files".to_owned(),
        ErrorKind::ReadOnlyFilesystem => "the disk with the ledger's file is read-only".to_owned(),
        ErrorKind::InvalidData => format!("it is not a ledger, or damaged ({error})"),
        _ => error.to_string(),
    }
}
