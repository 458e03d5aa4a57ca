-- By how much inferences take longer than predicted: what a model on so many devices of one kind was seen to need.
CREATE TABLE learned_rates (
    model_digest  TEXT NOT NULL,
    device        TEXT NOT NULL,
    ranks         INTEGER NOT NULL,
    work          TEXT NOT NULL CHECK (work IN ('prefill', 'generate')),
    -- Mean and variance of the logarithm of observed over predicted seconds.
    ln_factor     REAL NOT NULL,
    ln_variance   REAL NOT NULL,
    observations  INTEGER NOT NULL,
    updated_at    INTEGER NOT NULL,
    PRIMARY KEY (model_digest, device, ranks, work)
) STRICT;
