#!/usr/bin/env bash
# Run once, by the database's container when it makes its data: the roles that log in. What they may do is given by `apbd migrate`.
set -euo pipefail
psql -X -v ON_ERROR_STOP=1 -U "$POSTGRES_USER" -d "$POSTGRES_DB" <<'SQL'
\set app `cat "${SECRETS:-/run/secrets}/app_password"`
\set reporter `cat "${SECRETS:-/run/secrets}/reporter_password"`
CREATE ROLE apbd_app LOGIN PASSWORD :'app';
CREATE ROLE apbd_reporter LOGIN PASSWORD :'reporter';
REVOKE ALL ON DATABASE :"DBNAME" FROM PUBLIC;
GRANT CONNECT ON DATABASE :"DBNAME" TO apbd_app, apbd_reporter;
SQL
