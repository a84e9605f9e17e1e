-- Webhooks, and their deliveries: those that are pending, and those of the last days. SQLite's migration explains them.

-- +goose Up

CREATE TABLE webhooks (
    id            TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    org_id        TEXT COLLATE "C" NOT NULL,
    name          TEXT COLLATE "C" NOT NULL,
    url           TEXT COLLATE "C" NOT NULL,
    format        TEXT COLLATE "C" NOT NULL,
    types         TEXT COLLATE "C" NOT NULL, -- JSON
    secret        TEXT COLLATE "C" NOT NULL,
    created_at    BIGINT  NOT NULL,
    enabled       BOOLEAN NOT NULL,
    enabled_at    BIGINT,
    reason        TEXT COLLATE "C" NOT NULL,
    disabled_at   BIGINT,
    after_seq     BIGINT  NOT NULL,
    pending       BIGINT  NOT NULL,
    pending_bytes BIGINT  NOT NULL,
    deleted_at    BIGINT
);

CREATE INDEX webhooks_page ON webhooks (org_id, created_at, id) WHERE deleted_at IS NULL;
CREATE INDEX webhooks_enabled ON webhooks (org_id, id) WHERE enabled;

CREATE TABLE webhook_deliveries (
    webhook_id  TEXT COLLATE "C" NOT NULL,
    seq         BIGINT NOT NULL,
    lane        TEXT COLLATE "C" NOT NULL,
    type        TEXT COLLATE "C" NOT NULL,
    body        TEXT COLLATE "C" NOT NULL,
    queued_at   BIGINT NOT NULL,
    made_at     BIGINT,
    attempts    BIGINT NOT NULL,
    failed_at   BIGINT,
    next_at     BIGINT,
    tried_at    BIGINT,
    took        BIGINT NOT NULL,
    status_code BIGINT NOT NULL,
    error       TEXT COLLATE "C" NOT NULL,
    answer      TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (webhook_id, seq)
);

CREATE INDEX webhook_lanes ON webhook_deliveries (webhook_id, lane, seq) WHERE made_at IS NULL;
CREATE INDEX webhook_due ON webhook_deliveries (webhook_id, next_at) WHERE next_at IS NOT NULL;
CREATE UNIQUE INDEX webhook_heads ON webhook_deliveries (webhook_id, lane) WHERE next_at IS NOT NULL;
CREATE INDEX webhook_made ON webhook_deliveries (webhook_id, seq) WHERE made_at IS NOT NULL;
