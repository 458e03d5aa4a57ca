-- The state of all jobs. Times are milliseconds since 1970 in UTC, taken from the database's own clock; the report views show them as text.

CREATE TABLE jobs (
    job_id             TEXT PRIMARY KEY,
    payload_digest     TEXT NOT NULL,
    message            TEXT NOT NULL,
    task               TEXT NOT NULL,
    document           TEXT NOT NULL,
    model              TEXT,
    priority           INTEGER NOT NULL,
    deadline           INTEGER,
    size_bytes         INTEGER,
    door               TEXT NOT NULL,
    origin             TEXT NOT NULL,
    reply_target       TEXT,
    reply_correlation  TEXT,
    state              TEXT NOT NULL CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'dead', 'cancelled')),
    attempt            INTEGER NOT NULL DEFAULT 0,
    suspect_failures   INTEGER NOT NULL DEFAULT 0,
    infra_failures     INTEGER NOT NULL DEFAULT 0,
    cancel_requested   INTEGER NOT NULL DEFAULT 0,
    available_at       INTEGER NOT NULL,
    enqueued_at        INTEGER NOT NULL,
    started_at         INTEGER,
    finished_at        INTEGER,
    worker             TEXT,
    lease_until        INTEGER,
    progress           TEXT,
    error_code         TEXT,
    error_message      TEXT,
    tokens_in          INTEGER,
    tokens_out         INTEGER
) STRICT;

CREATE INDEX jobs_to_claim ON jobs (priority DESC, deadline, size_bytes, enqueued_at) WHERE state = 'queued';
CREATE INDEX jobs_running ON jobs (lease_until) WHERE state = 'running';
CREATE INDEX jobs_newest ON jobs (enqueued_at DESC);

CREATE TABLE attempts (
    job_id         TEXT NOT NULL REFERENCES jobs,
    attempt        INTEGER NOT NULL,
    worker         TEXT NOT NULL,
    started_at     INTEGER NOT NULL,
    ended_at       INTEGER,
    outcome        TEXT NOT NULL,
    error_code     TEXT,
    error_message  TEXT,
    queue_ms       REAL,
    fetch_ms       REAL,
    decode_ms      REAL,
    tokenize_ms    REAL,
    prefill_ms     REAL,
    generate_ms    REAL,
    record_ms      REAL,
    PRIMARY KEY (job_id, attempt)
) STRICT;

CREATE TABLE documents (
    job_id      TEXT NOT NULL REFERENCES jobs,
    position    INTEGER NOT NULL,
    uri         TEXT NOT NULL,
    bytes       INTEGER,
    digest      TEXT,
    version_id  TEXT,
    etag        TEXT,
    media_type  TEXT,
    encoding    TEXT,
    tokens      INTEGER,
    PRIMARY KEY (job_id, position)
) STRICT;

CREATE TABLE results (
    job_id                 TEXT PRIMARY KEY REFERENCES jobs,
    attempt                INTEGER NOT NULL,
    text                   TEXT NOT NULL,
    extraction             TEXT,
    tokens_in              INTEGER NOT NULL,
    tokens_out             INTEGER NOT NULL,
    stop                   TEXT NOT NULL,
    model                  TEXT NOT NULL,
    model_digest           TEXT NOT NULL,
    device                 TEXT NOT NULL,
    plan                   TEXT NOT NULL,
    approximate_attention  INTEGER NOT NULL,
    input_truncated        INTEGER NOT NULL,
    overflow               TEXT NOT NULL,
    output_truncated       INTEGER NOT NULL,
    schema_failed          INTEGER NOT NULL,
    text_cleaned           INTEGER NOT NULL
) STRICT;

CREATE TABLE outbox (
    event_id        TEXT PRIMARY KEY,
    job_id          TEXT NOT NULL REFERENCES jobs,
    target          TEXT NOT NULL,
    correlation_id  TEXT,
    body            TEXT NOT NULL,
    tries           INTEGER NOT NULL DEFAULT 0,
    available_at    INTEGER NOT NULL,
    given_up        TEXT
) STRICT;

CREATE INDEX outbox_to_send ON outbox (available_at) WHERE given_up IS NULL;

-- The same bytes under another message id are another message.
CREATE TABLE rejections (
    door         TEXT NOT NULL,
    origin       TEXT NOT NULL,
    digest       TEXT NOT NULL,
    message_id   TEXT,
    job_id       TEXT,
    code         TEXT NOT NULL,
    reason       TEXT NOT NULL,
    size_bytes   INTEGER NOT NULL,
    rejected_at  INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX rejections_once ON rejections (door, origin, digest, coalesce(message_id, ''));

-- What drop folders have seen: one row a file, of the version that is there now. The truth about what was taken is in `jobs` and `rejections`;
-- a row that is lost is made again by the next look.
CREATE TABLE drop_files (
    place       TEXT NOT NULL,
    -- Digest of the document's URI; a sidecar has that of the document it belongs to.
    file        TEXT NOT NULL,
    is_sidecar  INTEGER NOT NULL,
    uri         TEXT NOT NULL,
    version     TEXT NOT NULL,
    etag        TEXT,
    size_bytes  INTEGER NOT NULL,
    fault       TEXT,
    state       TEXT NOT NULL CHECK (state IN ('settling', 'taken', 'rejected', 'disposed')),
    job_id      TEXT,
    since       INTEGER NOT NULL,
    seen_at     INTEGER NOT NULL,
    PRIMARY KEY (place, file, is_sidecar)
) STRICT;

CREATE INDEX drop_files_settling ON drop_files (place, file) WHERE state = 'settling' AND NOT is_sidecar;
CREATE INDEX drop_files_done ON drop_files (place, file) WHERE state IN ('taken', 'rejected') AND NOT is_sidecar;

-- Where results are also written as files, and which are still to be. Empty where nobody wants them.
CREATE TABLE export_places (
    place    TEXT PRIMARY KEY,
    seen_at  INTEGER NOT NULL
) STRICT;

CREATE TABLE exports (
    place         TEXT NOT NULL,
    job_id        TEXT NOT NULL REFERENCES jobs,
    attempt       INTEGER NOT NULL,
    available_at  INTEGER NOT NULL,
    PRIMARY KEY (place, job_id)
) STRICT;

CREATE INDEX exports_to_write ON exports (place, available_at);
