-- What people report from. The columns of the report_ views are an interface: the tables behind them may change, these do not.
--
-- Sums are kept while jobs end, in the transaction that ends them, so that a report reads thousands of rows instead of millions.
-- Each sum is spread over eight slots, by the connection that adds to it: jobs that end at the same time rarely wait for each other.

-- Endings of jobs: one that was replayed has several.
CREATE TABLE endings_hourly (
    hour        timestamptz NOT NULL,
    task        text NOT NULL,
    model       text NOT NULL,
    state       text NOT NULL,
    slot        smallint NOT NULL,
    jobs        bigint NOT NULL,
    tokens_in   bigint NOT NULL,
    tokens_out  bigint NOT NULL,
    PRIMARY KEY (hour, task, model, state, slot)
) WITH (fillfactor = 50);

-- Times of successful attempts. Bucket b has the times of 1.02^(b-1) to 1.02^b microseconds.
CREATE TABLE stage_times (
    task      text NOT NULL,
    model     text NOT NULL,
    stage     text NOT NULL,
    bucket    smallint NOT NULL,
    slot      smallint NOT NULL,
    attempts  bigint NOT NULL,
    total_ms  double precision NOT NULL,
    PRIMARY KEY (task, model, stage, bucket, slot)
) WITH (fillfactor = 50);

CREATE FUNCTION add_ending() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO endings_hourly AS e (hour, task, model, state, slot, jobs, tokens_in, tokens_out)
    VALUES (date_trunc('hour', NEW.finished_at, 'UTC'), NEW.task, coalesce(NEW.served_by, NEW.model, ''), NEW.state, pg_backend_pid() % 8,
            1, coalesce(NEW.tokens_in, 0), coalesce(NEW.tokens_out, 0))
    ON CONFLICT (hour, task, model, state, slot) DO UPDATE
    SET jobs = e.jobs + 1, tokens_in = e.tokens_in + excluded.tokens_in, tokens_out = e.tokens_out + excluded.tokens_out;
    RETURN NULL;
END $$;

CREATE TRIGGER job_ended AFTER UPDATE OF state ON jobs FOR EACH ROW
WHEN (OLD.state IN ('queued', 'running') AND NEW.state IN ('succeeded', 'failed', 'dead', 'cancelled'))
EXECUTE FUNCTION add_ending();

CREATE FUNCTION add_stage_times() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO stage_times AS s (task, model, stage, bucket, slot, attempts, total_ms)
    SELECT j.task, coalesce(j.served_by, j.model, ''), t.stage, ceil(ln(greatest(t.ms * 1000, 1)) / ln(1.02)), pg_backend_pid() % 8, 1, t.ms
    FROM jobs j, (VALUES ('queue', NEW.queue_ms), ('fetch', NEW.fetch_ms), ('decode', NEW.decode_ms), ('tokenize', NEW.tokenize_ms),
                         ('prefill', NEW.prefill_ms), ('generate', NEW.generate_ms), ('record', NEW.record_ms)) AS t (stage, ms)
    WHERE j.job_id = NEW.job_id AND t.ms IS NOT NULL
    -- Always in the same order: two connections of one slot wait for each other, and never in a circle.
    ORDER BY t.stage
    ON CONFLICT (task, model, stage, bucket, slot) DO UPDATE SET attempts = s.attempts + 1, total_ms = s.total_ms + excluded.total_ms;
    RETURN NULL;
END $$;

CREATE TRIGGER attempt_succeeded AFTER UPDATE OF outcome ON attempts FOR EACH ROW
WHEN (OLD.outcome = 'running' AND NEW.outcome = 'succeeded')
EXECUTE FUNCTION add_stage_times();

CREATE VIEW report_jobs AS
SELECT j.job_id, j.state, j.task, j.document, coalesce(j.served_by, j.model) AS model, j.priority, j.attempt AS attempts,
       j.enqueued_at, j.started_at, j.finished_at,
       j.tokens_in, j.tokens_out, a.prefill_ms, a.generate_ms,
       r.approximate_attention, r.input_truncated, r.overflow, r.output_truncated, r.schema_failed, r.text_cleaned,
       r.text, r.extraction, j.error_code, j.error_message
FROM jobs j
LEFT JOIN attempts a ON a.job_id = j.job_id AND a.attempt = j.attempt
LEFT JOIN results r ON r.job_id = j.job_id
ORDER BY j.enqueued_at DESC, j.job_id;

CREATE VIEW report_throughput_hourly AS
SELECT hour, task, nullif(model, '') AS model, state,
       sum(jobs)::bigint AS jobs, sum(tokens_in)::bigint AS tokens_in, sum(tokens_out)::bigint AS tokens_out
FROM endings_hourly
GROUP BY 1, 2, 3, 4
ORDER BY 1 DESC, 2, 3, 4;

-- Each percentile is the middle of the bucket that holds the nearest rank, so it is within 1 % of it.
CREATE VIEW report_latency AS
WITH buckets AS (
    SELECT task, model, stage, bucket, sum(attempts) AS attempts FROM stage_times GROUP BY 1, 2, 3, 4
), ranked AS (
    SELECT *, sum(attempts) OVER (PARTITION BY task, model, stage ORDER BY bucket) AS up_to,
           sum(attempts) OVER (PARTITION BY task, model, stage) AS n, power(1.02::double precision, bucket - 0.5) / 1000 AS ms
    FROM buckets
)
SELECT stage, task, nullif(model, '') AS model, max(n)::bigint AS attempts,
       min(ms) FILTER (WHERE up_to * 100 >= n * 50) AS p50_ms,
       min(ms) FILTER (WHERE up_to * 100 >= n * 95) AS p95_ms,
       min(ms) FILTER (WHERE up_to * 100 >= n * 99) AS p99_ms
FROM ranked
GROUP BY stage, task, model
ORDER BY array_position(ARRAY['queue', 'fetch', 'decode', 'tokenize', 'prefill', 'generate', 'record'], stage), 2, 3;

CREATE VIEW report_failures AS
SELECT 'job' AS kind, state, error_code AS code, count(*) AS count, max(finished_at) AS last_at
FROM jobs WHERE state IN ('failed', 'dead') GROUP BY state, error_code
UNION ALL
SELECT 'rejection', 'rejected', code, count(*), max(rejected_at) FROM rejections GROUP BY code
ORDER BY count DESC, code;

CREATE VIEW report_tokens AS
WITH tokens AS (
    SELECT task, model, sum(jobs)::bigint AS jobs, sum(tokens_in)::bigint AS tokens_in, sum(tokens_out)::bigint AS tokens_out
    FROM endings_hourly WHERE state = 'succeeded' GROUP BY 1, 2
), times AS (
    SELECT task, model, sum(total_ms) FILTER (WHERE stage = 'prefill') AS prefill_ms, sum(total_ms) FILTER (WHERE stage = 'generate') AS generate_ms
    FROM stage_times WHERE stage IN ('prefill', 'generate') GROUP BY 1, 2
)
SELECT task, nullif(model, '') AS model, jobs, tokens_in, tokens_out,
       round(tokens_in / nullif(prefill_ms / 1000, 0)) AS prefill_tokens_per_s,
       round((tokens_out / nullif(generate_ms / 1000, 0))::numeric, 1)::double precision AS generated_tokens_per_s
FROM tokens LEFT JOIN times USING (task, model)
ORDER BY 1, 2;

CREATE VIEW report_backlog AS
SELECT state, task, model, priority, count(*) AS jobs, sum(size_bytes)::bigint AS bytes, min(enqueued_at) AS oldest_at
FROM (SELECT * FROM jobs WHERE state = 'queued' UNION ALL SELECT * FROM jobs WHERE state = 'running') AS unfinished
GROUP BY 1, 2, 3, 4
ORDER BY 1, 4 DESC, 2, 3;

COMMENT ON VIEW report_jobs IS 'One row a job, newest first, with its result and the times of its last attempt.';
COMMENT ON COLUMN report_jobs.job_id IS 'Id of the job';
COMMENT ON COLUMN report_jobs.state IS 'queued, running, succeeded, failed, dead or cancelled';
COMMENT ON COLUMN report_jobs.task IS 'summarise, extract or ask';
COMMENT ON COLUMN report_jobs.document IS 'URI of the first document';
COMMENT ON COLUMN report_jobs.model IS 'Model of the last result; without one, the model the producer asked for';
COMMENT ON COLUMN report_jobs.priority IS '0 to 9, the highest first';
COMMENT ON COLUMN report_jobs.attempts IS 'Attempts so far';
COMMENT ON COLUMN report_jobs.tokens_in IS 'Tokens of context and query';
COMMENT ON COLUMN report_jobs.tokens_out IS 'Tokens generated';
COMMENT ON COLUMN report_jobs.prefill_ms IS 'Prefill of the last attempt, milliseconds';
COMMENT ON COLUMN report_jobs.generate_ms IS 'Generation of the last attempt, milliseconds';
COMMENT ON COLUMN report_jobs.text IS 'Result as text';
COMMENT ON COLUMN report_jobs.extraction IS 'Result as JSON, of extract';
COMMENT ON COLUMN report_jobs.error_code IS 'Why the last attempt gave no result';

COMMENT ON VIEW report_throughput_hourly IS 'Endings of jobs by hour (UTC), task, model and state. A job that was replayed has ended several times.';
COMMENT ON COLUMN report_throughput_hourly.hour IS 'Begin of the hour';
COMMENT ON COLUMN report_throughput_hourly.jobs IS 'Endings';
COMMENT ON COLUMN report_throughput_hourly.tokens_in IS 'Tokens read';
COMMENT ON COLUMN report_throughput_hourly.tokens_out IS 'Tokens generated';

COMMENT ON VIEW report_latency IS 'Percentiles of the stages of successful attempts, over all time, by stage, task and model; within 1 %.';
COMMENT ON COLUMN report_latency.stage IS 'queue, fetch, decode, tokenize, prefill, generate or record';
COMMENT ON COLUMN report_latency.attempts IS 'Successful attempts that reached the stage';
COMMENT ON COLUMN report_latency.p50_ms IS 'Median, milliseconds';
COMMENT ON COLUMN report_latency.p95_ms IS '95th percentile, milliseconds';
COMMENT ON COLUMN report_latency.p99_ms IS '99th percentile, milliseconds';

COMMENT ON VIEW report_failures IS 'Jobs that failed or are dead, and rejected messages or objects, by reason.';
COMMENT ON COLUMN report_failures.kind IS 'job or rejection';
COMMENT ON COLUMN report_failures.code IS 'Stable code of the reason';
COMMENT ON COLUMN report_failures.count IS 'How many';
COMMENT ON COLUMN report_failures.last_at IS 'The newest';

COMMENT ON VIEW report_tokens IS 'Successful endings and tokens by task and model, with the rates of prefill and generation.';
COMMENT ON COLUMN report_tokens.jobs IS 'Successful endings';
COMMENT ON COLUMN report_tokens.prefill_tokens_per_s IS 'Input tokens a second of prefill';
COMMENT ON COLUMN report_tokens.generated_tokens_per_s IS 'Generated tokens a second of generation';

COMMENT ON VIEW report_backlog IS 'Jobs waiting and running, by state, task, model and priority.';
COMMENT ON COLUMN report_backlog.jobs IS 'How many';
COMMENT ON COLUMN report_backlog.bytes IS 'Bytes of their documents as far as known';
COMMENT ON COLUMN report_backlog.oldest_at IS 'When the oldest was taken in';
