PRAGMA application_id = 1347243087;
BEGIN TRANSACTION;
CREATE TABLE migrations (version INTEGER NOT NULL PRIMARY KEY, applied REAL NOT NULL) STRICT;
INSERT INTO migrations VALUES (1, 1790000000.5);
INSERT INTO accounts VALUES ('default'), ('acme');
INSERT INTO keys VALUES ('k1', 'default', 1, x'00ff', '["gpt-4"]', 1790000001.5, NULL, NULL), ('k2', 'default', 0, x'01', '[]', 1790000002.5, 1890000000.5, 1790000003.5), ('k3', 'acme', 0, x'02', '[]', 1790000004.5, NULL, NULL);
COMMIT;
