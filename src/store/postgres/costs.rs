//! Learned rates.
//!
//! Invariant: mean and variance go on in one statement, under the row's lock.

use async_trait::async_trait;
use sqlx::Row;

use super::PostgresStore;
use crate::cost::{Learned, MEMORY, Observation, Place, Rate};
use crate::store::StoreError;
use crate::store::costs::{CostStore, joined};

/// Of an observation: one in all so far, but at least one in `$6`.
macro_rules! weight {
    () => {
        "greatest(1.0::float8 / (r.observations + 1), 1.0::float8 / $6)"
    };
}

/// The sums of `Rate::with`.
const OBSERVE: &str = concat!(
    "INSERT INTO learned_rates AS r (model_digest, device, ranks, work, ln_factor, ln_variance, observations, updated_at) \
     VALUES ($1, $2, $3, $4, $5, 0, 1, now()) ON CONFLICT (model_digest, device, ranks, work) DO UPDATE SET ",
    "ln_factor = r.ln_factor + ",
    weight!(),
    " * (excluded.ln_factor - r.ln_factor), ln_variance = (1 - ",
    weight!(),
    ") * (r.ln_variance + ",
    weight!(),
    " * (excluded.ln_factor - r.ln_factor) * (excluded.ln_factor - r.ln_factor)), \
     observations = r.observations + 1, updated_at = now()",
);

const LEARNED: &str = "\
SELECT device, ranks, work, ln_factor, ln_variance, observations FROM learned_rates WHERE model_digest = $1 ORDER BY device COLLATE \"C\", ranks";

#[async_trait]
impl CostStore for PostgresStore {
    async fn cost_observe(&self, observation: &Observation) -> Result<(), StoreError> {
        let Some(ln_factor) = observation.ln_factor() else { return Ok(()) };
        let Place { model_digest, device, ranks } = &observation.place;
        let query = sqlx::query(OBSERVE).bind(model_digest).bind(device).bind(ranks.cast_signed());
        let query = query.bind(observation.work.as_str()).bind(ln_factor).bind(f64::from(MEMORY));
        query.execute(&self.pool).await.map(drop).map_err(|error| self.error("cost_observe", error))
    }

    async fn cost_learned(&self, model_digest: &str) -> Result<Vec<(Place, Learned)>, StoreError> {
        let query = sqlx::query(LEARNED).bind(model_digest);
        let rows = query.fetch_all(&self.pool).await.map_err(|error| self.error("cost_learned", error))?;
        let rate = |row: &sqlx::postgres::PgRow| {
            let ranks = row.get::<i32, _>("ranks").cast_unsigned();
            let place = Place { model_digest: model_digest.to_owned(), device: row.get("device"), ranks };
            let work = self.parsed("cost_learned", "work", row)?;
            let observations = row.get::<i64, _>("observations").cast_unsigned();
            let rate = Rate { ln_factor: row.get("ln_factor"), ln_variance: row.get("ln_variance"), observations };
            Ok((place, (work, rate)))
        };
        Ok(joined(rows.iter().map(rate).collect::<Result<_, _>>()?))
    }
}
