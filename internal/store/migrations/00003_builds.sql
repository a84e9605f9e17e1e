-- Templates of organizations: what their newest build is made from, and where
-- it stands. Registry credentials are not here and nowhere on the disk.

-- +goose Up

-- Was a text, is JSON now. Only built-in templates had one, and a failed one is
-- built again at the next start.
UPDATE templates SET build_error = 'null';

ALTER TABLE templates ADD COLUMN build_id TEXT NOT NULL DEFAULT '';
ALTER TABLE templates ADD COLUMN tries BIGINT NOT NULL DEFAULT 0;
ALTER TABLE templates ADD COLUMN queued_at BIGINT; -- NULL: no build waits or runs
ALTER TABLE templates DROP COLUMN start_command; -- no template had one
ALTER TABLE templates ADD COLUMN start TEXT NOT NULL DEFAULT '{}'; -- JSON

CREATE INDEX templates_queued ON templates (queued_at, id) WHERE queued_at IS NOT NULL;
CREATE INDEX templates_image ON templates (image);

-- Apart from the templates, because listings do not need it and it may be large.
CREATE TABLE template_builds (
    template_id TEXT    NOT NULL PRIMARY KEY REFERENCES templates (id) ON DELETE CASCADE,
    definition  TEXT    NOT NULL, -- JSON
    context     TEXT    NOT NULL, -- hex SHA-256 of the file, '' is none
    refresh     BOOLEAN NOT NULL,
    private     BOOLEAN NOT NULL
);

ALTER TABLE template_logs ADD COLUMN step BIGINT NOT NULL DEFAULT 0;
ALTER TABLE template_logs ADD COLUMN heading BOOLEAN NOT NULL DEFAULT FALSE;

CREATE INDEX sandboxes_of_template ON sandboxes (template_id) WHERE ended_at IS NULL;
