-- By how much inferences take longer than predicted: what a model on so many devices of one kind was seen to need.
CREATE TABLE learned_rates (
    model_digest  text NOT NULL,
    device        text NOT NULL,
    ranks         integer NOT NULL,
    work          text NOT NULL CHECK (work IN ('prefill', 'generate')),
    -- Mean and variance of the logarithm of observed over predicted seconds.
    ln_factor     double precision NOT NULL,
    ln_variance   double precision NOT NULL,
    observations  bigint NOT NULL,
    updated_at    timestamptz NOT NULL,
    PRIMARY KEY (model_digest, device, ranks, work)
);
