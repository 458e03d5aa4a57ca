-- Where the nodes that work on a document together meet: written by the first node of a group at every start of its engine.
CREATE TABLE meeting_places (
    address      TEXT PRIMARY KEY,
    -- What lets in those of this start, and keeps those of an earlier one out.
    token        TEXT NOT NULL,
    -- Nobody is waited for there after that.
    valid_until  TIMESTAMPTZ NOT NULL
);
