-- What people report from. The columns of these views are an interface: the tables behind them may change, these do not.

CREATE VIEW report_jobs AS
SELECT j.job_id, j.state, j.task, j.document, coalesce(r.model, j.model) AS model, j.priority, j.attempt AS attempts,
       datetime(j.enqueued_at / 1000, 'unixepoch') AS enqueued_at,
       datetime(j.started_at / 1000, 'unixepoch') AS started_at,
       datetime(j.finished_at / 1000, 'unixepoch') AS finished_at,
       j.tokens_in, j.tokens_out, a.prefill_ms, a.generate_ms,
       r.approximate_attention, r.input_truncated, r.overflow, r.output_truncated, r.schema_failed, r.text_cleaned,
       r.text, r.extraction, j.error_code, j.error_message
FROM jobs j
LEFT JOIN attempts a ON a.job_id = j.job_id AND a.attempt = j.attempt
LEFT JOIN results r ON r.job_id = j.job_id
ORDER BY j.enqueued_at DESC, j.job_id;

CREATE VIEW report_throughput_hourly AS
SELECT strftime('%Y-%m-%d %H:00:00', j.finished_at / 1000, 'unixepoch') AS hour, j.task, coalesce(r.model, j.model) AS model, j.state,
       count(*) AS jobs, sum(j.tokens_in) AS tokens_in, sum(j.tokens_out) AS tokens_out
FROM jobs j LEFT JOIN results r ON r.job_id = j.job_id
WHERE j.finished_at IS NOT NULL
GROUP BY 1, 2, 3, 4
ORDER BY 1 DESC, 2, 3, 4;

CREATE VIEW report_latency AS
WITH times AS (
    SELECT stages.stage, stages.position, j.task, coalesce(r.model, j.model) AS model,
           CASE stages.stage WHEN 'queue' THEN a.queue_ms WHEN 'fetch' THEN a.fetch_ms WHEN 'decode' THEN a.decode_ms
               WHEN 'tokenize' THEN a.tokenize_ms WHEN 'prefill' THEN a.prefill_ms WHEN 'generate' THEN a.generate_ms
               ELSE a.record_ms END AS ms
    FROM attempts a
    JOIN jobs j ON j.job_id = a.job_id
    LEFT JOIN results r ON r.job_id = a.job_id
    CROSS JOIN (SELECT 1 AS position, 'queue' AS stage UNION ALL SELECT 2, 'fetch' UNION ALL SELECT 3, 'decode' UNION ALL SELECT 4, 'tokenize'
                UNION ALL SELECT 5, 'prefill' UNION ALL SELECT 6, 'generate' UNION ALL SELECT 7, 'record') AS stages
    WHERE a.outcome = 'succeeded'
), ranked AS (
    SELECT *, row_number() OVER (PARTITION BY stage, task, model ORDER BY ms) AS place, count(*) OVER (PARTITION BY stage, task, model) AS n
    FROM times WHERE ms IS NOT NULL
)
-- The nearest rank: the smallest time that so many of a hundred do not exceed.
SELECT stage, task, model, max(n) AS attempts,
       min(CASE WHEN place * 100 >= n * 50 THEN ms END) AS p50_ms,
       min(CASE WHEN place * 100 >= n * 95 THEN ms END) AS p95_ms,
       min(CASE WHEN place * 100 >= n * 99 THEN ms END) AS p99_ms
FROM ranked
GROUP BY position, stage, task, model
ORDER BY position, task, model;

CREATE VIEW report_failures AS
SELECT 'job' AS kind, j.state, j.error_code AS code, count(*) AS count, datetime(max(j.finished_at) / 1000, 'unixepoch') AS last_at
FROM jobs j WHERE j.state IN ('failed', 'dead') GROUP BY j.state, j.error_code
UNION ALL
SELECT 'rejection', 'rejected', code, count(*), datetime(max(rejected_at) / 1000, 'unixepoch') FROM rejections GROUP BY code
ORDER BY count DESC, code;

CREATE VIEW report_tokens AS
SELECT j.task, r.model, count(*) AS jobs, sum(r.tokens_in) AS tokens_in, sum(r.tokens_out) AS tokens_out,
       round(sum(r.tokens_in) / (sum(a.prefill_ms) / 1000)) AS prefill_tokens_per_s,
       round(sum(r.tokens_out) / (sum(a.generate_ms) / 1000), 1) AS generated_tokens_per_s
FROM results r
JOIN jobs j ON j.job_id = r.job_id
JOIN attempts a ON a.job_id = r.job_id AND a.attempt = r.attempt
GROUP BY 1, 2
ORDER BY 1, 2;

CREATE VIEW report_backlog AS
SELECT state, task, model, priority, count(*) AS jobs, sum(size_bytes) AS bytes, datetime(min(enqueued_at) / 1000, 'unixepoch') AS oldest_at
FROM jobs WHERE state IN ('queued', 'running')
GROUP BY 1, 2, 3, 4
ORDER BY 1, 4 DESC, 2, 3;
