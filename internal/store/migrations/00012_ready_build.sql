-- Tags name builds that are ready, and know when their image is gone. Of a version whose template has
-- another build since, the build is not known.

-- +goose Up

ALTER TABLE templates ADD COLUMN ready_build TEXT NOT NULL DEFAULT '';
UPDATE templates SET ready_build = build_id WHERE status = 'ready';

ALTER TABLE template_builds ADD COLUMN repairs TEXT NOT NULL DEFAULT ''; -- hex SHA-256 of an image that is gone

ALTER TABLE template_tags ADD COLUMN gone BOOLEAN NOT NULL DEFAULT FALSE;
CREATE INDEX template_tags_image ON template_tags (image);
