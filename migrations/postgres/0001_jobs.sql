-- The state of all jobs. Times are taken from the database's own clock.

CREATE TABLE jobs (
    job_id             uuid PRIMARY KEY,
    payload_digest     text NOT NULL,
    -- Text, since a producer's string may hold the escape of a character that jsonb can not.
    message            text NOT NULL,
    task               text NOT NULL,
    document           text NOT NULL,
    model              text,
    -- The model of the last attempt that gave a result.
    served_by          text,
    priority           smallint NOT NULL,
    deadline           timestamptz,
    size_bytes         bigint,
    door               text NOT NULL,
    origin             text NOT NULL,
    reply_target       text,
    reply_correlation  text,
    state              text NOT NULL CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'dead', 'cancelled')),
    attempt            integer NOT NULL DEFAULT 0,
    suspect_failures   integer NOT NULL DEFAULT 0,
    infra_failures     integer NOT NULL DEFAULT 0,
    cancel_requested   boolean NOT NULL DEFAULT false,
    available_at       timestamptz NOT NULL,
    enqueued_at        timestamptz NOT NULL,
    started_at         timestamptz,
    finished_at        timestamptz,
    worker             text,
    lease_until        timestamptz,
    progress           jsonb,
    error_code         text,
    error_message      text,
    tokens_in          bigint,
    tokens_out         bigint
) WITH (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);

-- In the order of the claim, and of waiting jobs alone: millions of finished ones cost it nothing.
CREATE INDEX jobs_to_claim ON jobs (priority DESC, deadline, size_bytes, enqueued_at, job_id) WHERE state = 'queued';
-- No column here that a heartbeat changes, so that a heartbeat writes no index.
CREATE INDEX jobs_running ON jobs (job_id) WHERE state = 'running';
CREATE INDEX jobs_due ON jobs (deadline) WHERE state = 'queued' AND deadline IS NOT NULL;
CREATE INDEX jobs_newest ON jobs (enqueued_at DESC, job_id);
CREATE INDEX jobs_unsuccessful ON jobs (state, error_code, finished_at) WHERE state IN ('failed', 'dead');

CREATE TABLE attempts (
    job_id         uuid NOT NULL REFERENCES jobs,
    attempt        integer NOT NULL,
    worker         text NOT NULL,
    started_at     timestamptz NOT NULL,
    ended_at       timestamptz,
    outcome        text NOT NULL,
    error_code     text,
    error_message  text,
    queue_ms       double precision,
    fetch_ms       double precision,
    decode_ms      double precision,
    tokenize_ms    double precision,
    prefill_ms     double precision,
    generate_ms    double precision,
    record_ms      double precision,
    PRIMARY KEY (job_id, attempt)
);

CREATE TABLE documents (
    job_id      uuid NOT NULL REFERENCES jobs,
    position    integer NOT NULL,
    uri         text NOT NULL,
    bytes       bigint,
    digest      text,
    version_id  text,
    etag        text,
    media_type  text,
    encoding    text,
    tokens      bigint,
    PRIMARY KEY (job_id, position)
);

CREATE TABLE results (
    job_id                 uuid PRIMARY KEY REFERENCES jobs,
    attempt                integer NOT NULL,
    text                   text NOT NULL,
    extraction             jsonb,
    tokens_in              bigint NOT NULL,
    tokens_out             bigint NOT NULL,
    stop                   text NOT NULL,
    model                  text NOT NULL,
    model_digest           text NOT NULL,
    device                 text NOT NULL,
    plan                   jsonb NOT NULL,
    approximate_attention  boolean NOT NULL,
    input_truncated        boolean NOT NULL,
    overflow               text NOT NULL,
    output_truncated       boolean NOT NULL,
    schema_failed          boolean NOT NULL,
    text_cleaned           boolean NOT NULL
);

CREATE TABLE outbox (
    event_id        uuid PRIMARY KEY,
    job_id          uuid NOT NULL REFERENCES jobs,
    target          text NOT NULL,
    correlation_id  text,
    body            jsonb NOT NULL,
    tries           integer NOT NULL DEFAULT 0,
    available_at    timestamptz NOT NULL,
    given_up        text
);

CREATE INDEX outbox_to_send ON outbox (available_at) WHERE given_up IS NULL;

-- The same bytes under another message id are another message.
CREATE TABLE rejections (
    door         text NOT NULL,
    origin       text NOT NULL,
    digest       text NOT NULL,
    message_id   text,
    job_id       uuid,
    code         text NOT NULL,
    reason       text NOT NULL,
    size_bytes   bigint NOT NULL,
    rejected_at  timestamptz NOT NULL
);
CREATE UNIQUE INDEX rejections_once ON rejections (door, origin, digest, coalesce(message_id, ''));

-- What drop folders have seen: one row a file, of the version that is there now. The truth about what was taken is in `jobs` and `rejections`;
-- a row that is lost is made again by the next look.
CREATE TABLE drop_files (
    place       text NOT NULL,
    -- Digest of the document's URI; a sidecar has that of the document it belongs to.
    file        text NOT NULL,
    is_sidecar  boolean NOT NULL,
    uri         text NOT NULL,
    version     text NOT NULL,
    etag        text,
    size_bytes  bigint NOT NULL,
    fault       text,
    state       text NOT NULL CHECK (state IN ('settling', 'taken', 'rejected', 'disposed')),
    job_id      uuid,
    since       timestamptz NOT NULL,
    seen_at     timestamptz NOT NULL,
    PRIMARY KEY (place, file, is_sidecar)
);

CREATE INDEX drop_files_settling ON drop_files (place, file) WHERE state = 'settling' AND NOT is_sidecar;
CREATE INDEX drop_files_done ON drop_files (place, file) WHERE state IN ('taken', 'rejected') AND NOT is_sidecar;

-- Where results are also written as files, and which are still to be. Empty where nobody wants them.
CREATE TABLE export_places (
    place    text PRIMARY KEY,
    seen_at  timestamptz NOT NULL
);

CREATE TABLE exports (
    place         text NOT NULL,
    job_id        uuid NOT NULL REFERENCES jobs,
    attempt       integer NOT NULL,
    available_at  timestamptz NOT NULL,
    PRIMARY KEY (place, job_id)
);

CREATE INDEX exports_to_write ON exports (place, available_at);
