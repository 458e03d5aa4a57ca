-- Where the nodes that work on a document together meet: written by the first node of a group at every start of its engine.
CREATE TABLE meeting_places (
    group_name   TEXT PRIMARY KEY,
    address      TEXT NOT NULL,
    -- What keeps nodes of an earlier start out.
    token        TEXT NOT NULL,
    -- Nobody looks for the others there any more after that.
    valid_until  INTEGER NOT NULL
) STRICT;
