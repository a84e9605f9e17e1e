-- What a machine makes a sandbox from is one JSON text. The columns that queries use stay beside it.
--
-- The rows of pooled sandboxes had a hash in place of the start command. Those that have one are
-- dropped, and the server removes their sandboxes. json_object is SQLite's: PostgreSQL begins with a
-- later schema.

-- +goose Up

ALTER TABLE sandboxes ADD COLUMN shape TEXT NOT NULL DEFAULT '{}';
UPDATE sandboxes SET shape = json_object('image', image, 'size', json_object('name', size, 'vcpus', vcpus, 'memory_mb', memory_mb,
        'dedicated', json(CASE WHEN dedicated THEN 'true' ELSE 'false' END)), 'disk_mb', disk_mb,
    'env', json(env), 'user', run_as, 'workdir', workdir, 'egress', json(egress));
ALTER TABLE sandboxes DROP COLUMN size;
ALTER TABLE sandboxes DROP COLUMN dedicated;
ALTER TABLE sandboxes DROP COLUMN disk_mb;
ALTER TABLE sandboxes DROP COLUMN env;
ALTER TABLE sandboxes DROP COLUMN egress;
ALTER TABLE sandboxes DROP COLUMN run_as;
ALTER TABLE sandboxes DROP COLUMN workdir;

ALTER TABLE snapshots ADD COLUMN shape TEXT NOT NULL DEFAULT '{}';
UPDATE snapshots SET shape = json_object('image', image, 'size', json_object('name', size, 'vcpus', vcpus, 'memory_mb', memory_mb,
        'dedicated', json(CASE WHEN dedicated THEN 'true' ELSE 'false' END)), 'disk_mb', disk_mb,
    'env', json(env), 'user', run_as, 'workdir', workdir, 'egress', json(egress));
ALTER TABLE snapshots DROP COLUMN size;
ALTER TABLE snapshots DROP COLUMN vcpus;
ALTER TABLE snapshots DROP COLUMN memory_mb;
ALTER TABLE snapshots DROP COLUMN dedicated;
ALTER TABLE snapshots DROP COLUMN disk_mb;
ALTER TABLE snapshots DROP COLUMN env;
ALTER TABLE snapshots DROP COLUMN egress;
ALTER TABLE snapshots DROP COLUMN run_as;
ALTER TABLE snapshots DROP COLUMN workdir;

DELETE FROM pool WHERE started <> '';
ALTER TABLE pool ADD COLUMN shape TEXT NOT NULL DEFAULT '{}';
UPDATE pool SET shape = json_object('image', image, 'size', json_object('name', size, 'vcpus', vcpus, 'memory_mb', memory_mb,
        'dedicated', json(CASE WHEN dedicated THEN 'true' ELSE 'false' END)), 'disk_mb', disk_mb);
ALTER TABLE pool DROP COLUMN size;
ALTER TABLE pool DROP COLUMN vcpus;
ALTER TABLE pool DROP COLUMN memory_mb;
ALTER TABLE pool DROP COLUMN dedicated;
ALTER TABLE pool DROP COLUMN disk_mb;
ALTER TABLE pool DROP COLUMN started;
