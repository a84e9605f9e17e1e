-- Tags name versions of templates, which stay usable when newer ones are built.

-- +goose Up

CREATE TABLE template_tags (
    template_id TEXT   NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
    tag         TEXT   NOT NULL,
    build_id    TEXT   NOT NULL,
    image       TEXT   NOT NULL, -- hex SHA-256 of the EROFS file
    version     TEXT   NOT NULL, -- JSON: what sandboxes are made from
    created_at  BIGINT NOT NULL,
    PRIMARY KEY (template_id, tag)
);
