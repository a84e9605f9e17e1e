-- Copies of checkpoints and snapshots in a bucket. A row makes the objects of its name, fence and number a checkpoint.

-- +goose Up

CREATE TABLE checkpoints (
    name        TEXT   NOT NULL, -- id of its sandbox or snapshot, which may be over
    node        TEXT   NOT NULL, -- that wrote it
    fence       BIGINT NOT NULL,
    number      BIGINT NOT NULL,
    made_at     BIGINT NOT NULL,
    bytes       BIGINT NOT NULL,
    cpu_class   TEXT   NOT NULL,
    agent       TEXT   NOT NULL, -- hex SHA-256 of the program
    runsc       TEXT   NOT NULL, -- the same
    sum         TEXT   NOT NULL, -- hex SHA-256, '' until it is uploaded
    uploaded_at BIGINT,          -- NULL until then
    PRIMARY KEY (name, fence, number)
);
