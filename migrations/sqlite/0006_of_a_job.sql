-- A job that is forgotten is looked for in every table that may refer to it.
CREATE INDEX outbox_of_job ON outbox (job_id);
CREATE INDEX exports_of_job ON exports (job_id);
