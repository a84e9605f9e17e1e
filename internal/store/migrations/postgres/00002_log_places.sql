-- +goose Up

ALTER TABLE template_logs ADD COLUMN dockerfile_line BIGINT NOT NULL DEFAULT 0;
