-- The events of all organizations in one sequence, which sandbox_events becomes a part of. An
-- event stays when its sandbox goes.
--
-- seq rises but has gaps, see event.Seq; it is SQLite's row id, which has 64 bits. number counts up from 1 in each sandbox and makes the
-- ids and cursors of a sandbox's own listing; it is NULL for what is not in that listing, or not
-- any more. event_horizons has the last event of an organization that was dropped from its feed,
-- event_consumers what each reader of the server's own has read.

-- +goose Up

CREATE TABLE events (
    seq        INTEGER NOT NULL PRIMARY KEY,
    org_id     TEXT    NOT NULL, -- '' is of no organization
    at         BIGINT  NOT NULL,
    type       TEXT    NOT NULL,
    sandbox_id TEXT    NOT NULL, -- may be gone; '' is none
    number     BIGINT,
    from_state TEXT    NOT NULL,
    to_state   TEXT    NOT NULL,
    reason     TEXT    NOT NULL,
    detail     TEXT    NOT NULL,
    about      TEXT    NOT NULL  -- JSON
);

-- Rows in the order of their numbers and of their times, where a clock was set back.
INSERT INTO events (seq, org_id, at, type, sandbox_id, number, from_state, to_state, reason, detail, about)
SELECT ROW_NUMBER() OVER (ORDER BY latest, sandbox_id, seq), org_id, at,
    CASE WHEN from_state <> to_state THEN 'sandbox.' || to_state
        WHEN reason = 'snapshot_made' THEN 'snapshot.created'
        ELSE 'sandbox.' || reason END,
    sandbox_id, seq, from_state, to_state, reason, detail,
    CASE WHEN reason = 'snapshot_made' AND LENGTH(detail) > 26
            THEN '{"snapshot_id":"' || SUBSTR(detail, 1, 25) || '","name":"' || SUBSTR(detail, 27) || '"}'
        WHEN reason = 'snapshot_made' THEN '{"snapshot_id":"' || detail || '"}'
        ELSE '{}' END
FROM (SELECT e.*, s.org_id AS org_id, MAX(e.at) OVER (PARTITION BY e.sandbox_id ORDER BY e.seq) AS latest
    FROM sandbox_events e JOIN sandboxes s ON s.id = e.sandbox_id) AS old;

DROP TABLE sandbox_events;

CREATE INDEX events_feed ON events (org_id, seq);
CREATE UNIQUE INDEX events_listing ON events (sandbox_id, number) WHERE number IS NOT NULL;

CREATE TABLE event_horizons (
    org_id TEXT   NOT NULL PRIMARY KEY,
    seq    BIGINT NOT NULL
);

CREATE TABLE event_consumers (
    name TEXT   NOT NULL PRIMARY KEY,
    seq  BIGINT NOT NULL
);
