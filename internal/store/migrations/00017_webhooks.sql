-- Webhooks, and their deliveries: those that are pending, and those of the last days.

-- +goose Up

CREATE TABLE webhooks (
    id            TEXT    NOT NULL PRIMARY KEY,
    org_id        TEXT    NOT NULL,
    name          TEXT    NOT NULL, -- '' is none
    url           TEXT    NOT NULL,
    format        TEXT    NOT NULL,
    types         TEXT    NOT NULL, -- JSON, null is all
    secret        TEXT    NOT NULL, -- as it is, since signatures need it; '' once the webhook is deleted
    created_at    BIGINT  NOT NULL,
    enabled       BOOLEAN NOT NULL,
    enabled_at    BIGINT,           -- NULL if it never was
    reason        TEXT    NOT NULL, -- why it is disabled, '' if it is not
    disabled_at   BIGINT,
    after_seq     BIGINT  NOT NULL, -- only events after it are delivered
    pending       BIGINT  NOT NULL, -- deliveries that are not made
    pending_bytes BIGINT  NOT NULL, -- of their bodies
    deleted_at    BIGINT            -- until its deliveries are deleted too
);

CREATE INDEX webhooks_page ON webhooks (org_id, created_at, id) WHERE deleted_at IS NULL;
CREATE INDEX webhooks_enabled ON webhooks (org_id, id) WHERE enabled;

CREATE TABLE webhook_deliveries (
    webhook_id  TEXT   NOT NULL,
    seq         BIGINT NOT NULL, -- of the event, which may be dropped
    lane        TEXT   NOT NULL, -- what the event is about
    type        TEXT   NOT NULL,
    body        TEXT   NOT NULL, -- '' once it is made
    queued_at   BIGINT NOT NULL,
    made_at     BIGINT,          -- NULL while it is pending
    attempts    BIGINT NOT NULL,
    failed_at   BIGINT,          -- the first attempt that failed since the delivery was queued or its webhook enabled
    next_at     BIGINT,          -- of the first pending one of its lane; NULL for others
    tried_at    BIGINT,          -- the last attempt
    took        BIGINT NOT NULL,
    status_code BIGINT NOT NULL, -- 0 is none
    error       TEXT   NOT NULL,
    answer      TEXT   NOT NULL,
    PRIMARY KEY (webhook_id, seq)
);

CREATE INDEX webhook_lanes ON webhook_deliveries (webhook_id, lane, seq) WHERE made_at IS NULL;
CREATE INDEX webhook_due ON webhook_deliveries (webhook_id, next_at) WHERE next_at IS NOT NULL;
CREATE UNIQUE INDEX webhook_heads ON webhook_deliveries (webhook_id, lane) WHERE next_at IS NOT NULL;
CREATE INDEX webhook_made ON webhook_deliveries (webhook_id, seq) WHERE made_at IS NOT NULL;
