-- Ports of sandboxes that anybody may reach. One that is not here needs a key or a
-- signature.

-- +goose Up

CREATE TABLE public_ports (
    sandbox_id TEXT   NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    port       BIGINT NOT NULL,
    PRIMARY KEY (sandbox_id, port)
);
