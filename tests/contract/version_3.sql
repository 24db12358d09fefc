PRAGMA application_id = 1347243087;
BEGIN TRANSACTION;
CREATE TABLE accounts (name TEXT NOT NULL PRIMARY KEY, plan TEXT NOT NULL DEFAULT 'pro', created REAL NOT NULL DEFAULT 0.0) STRICT, WITHOUT ROWID;
INSERT INTO "accounts" VALUES('acme','pro',1790000000.0);
INSERT INTO "accounts" VALUES('default','pro',1795663008.0);
CREATE TABLE grants (
            grant_id TEXT NOT NULL UNIQUE,
            account TEXT NOT NULL,
            live INTEGER NOT NULL,
            amount INTEGER NOT NULL CHECK (amount > 0),
            at REAL NOT NULL,
            note TEXT NOT NULL,
            FOREIGN KEY (account, live) REFERENCES wallets (account, live)
        ) STRICT
        ;
INSERT INTO "grants" VALUES('test credits of default','default',0,100000000,1795663008.0,'to begin with');
INSERT INTO "grants" VALUES('g1','acme',1,1000000,1790000001.0,'welcome');
CREATE TABLE holds (
            task_id TEXT NOT NULL PRIMARY KEY,
            account TEXT NOT NULL,
            live INTEGER NOT NULL,
            amount INTEGER NOT NULL CHECK (amount >= 0),
            window_start REAL NOT NULL,
            model TEXT NOT NULL,
            token_start REAL,
            tokens INTEGER NOT NULL CHECK (tokens >= 0),
            repeat_key TEXT,
            record BLOB NOT NULL,
            FOREIGN KEY (account, live) REFERENCES wallets (account, live)
        ) STRICT, WITHOUT ROWID
        ;
CREATE TABLE keys (
            key_id TEXT NOT NULL PRIMARY KEY,
            account TEXT NOT NULL REFERENCES accounts (name),
            live INTEGER NOT NULL CHECK (live IN (0, 1)),
            digest BLOB NOT NULL,
            models TEXT NOT NULL,
            created REAL NOT NULL,
            expires REAL,
            revoked REAL
        ) STRICT, WITHOUT ROWID
        ;
CREATE TABLE migrations (version INTEGER NOT NULL PRIMARY KEY, applied REAL NOT NULL) STRICT;
INSERT INTO "migrations" VALUES(1,1.7956630081138315201e+09);
INSERT INTO "migrations" VALUES(2,1.79566300811437296871e+09);
INSERT INTO "migrations" VALUES(3,1.79566300811441731453e+09);
CREATE TABLE repeats (
            account TEXT NOT NULL,
            live INTEGER NOT NULL,
            key TEXT NOT NULL,
            fingerprint BLOB NOT NULL,
            state TEXT NOT NULL DEFAULT 'running' CHECK (state IN ('running', 'done')),
            task_id TEXT NOT NULL,
            answer BLOB,
            expires REAL,
            UNIQUE (account, live, key),
            CHECK ((state = 'done') = (answer IS NOT NULL AND expires IS NOT NULL))
        ) STRICT
        ;
INSERT INTO "repeats" VALUES('acme',1,'again',X'66','done','task_0',X'616E73776572',1.79574940815160965915e+09);
CREATE TABLE token_windows (
            account TEXT NOT NULL,
            live INTEGER NOT NULL,
            model TEXT NOT NULL,
            start REAL NOT NULL,
            tokens INTEGER NOT NULL CHECK (tokens >= 0),
            PRIMARY KEY (account, live, model),
            FOREIGN KEY (account, live) REFERENCES wallets (account, live)
        ) STRICT, WITHOUT ROWID
        ;
CREATE TABLE usage (
        task_id TEXT NOT NULL UNIQUE,
        request_id TEXT NOT NULL,
        account TEXT NOT NULL,
        live INTEGER NOT NULL,
        key_id TEXT NOT NULL,
        wire TEXT NOT NULL,
        model TEXT NOT NULL,
        task_type TEXT NOT NULL,
        provider TEXT NOT NULL,
        provider_model TEXT NOT NULL,
        input_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        characters INTEGER NOT NULL,
        images INTEGER NOT NULL,
        pixels INTEGER NOT NULL,
        audio_ms INTEGER NOT NULL,
        processing_ms INTEGER NOT NULL,
        first_byte_ms INTEGER NOT NULL,
        output_bytes INTEGER NOT NULL,
        cost INTEGER NOT NULL CHECK (cost >= 0),
        uncollected INTEGER NOT NULL CHECK (uncollected >= 0),
        prices TEXT NOT NULL,
        price_version TEXT NOT NULL,
        source TEXT NOT NULL,
        complete INTEGER NOT NULL CHECK (complete IN (0, 1)),
        at REAL NOT NULL,
        FOREIGN KEY (account, live) REFERENCES wallets (account, live)
    ) STRICT
    ;
INSERT INTO "usage" VALUES('task_0','req_1','acme',1,'k1','rest','gpt-4','text','openai','gpt-5.6-sol',10000,10,0,0,0,0,5,0,9,40200,0,'million_input_tokens=4000000,million_output_tokens=20000000','2026-11-22','provider',1,1790000010.0);
INSERT INTO "usage" VALUES('task_1','req_1','acme',1,'k1','rest','gpt-4','text','openai','gpt-5.6-sol',500000,1000,0,0,0,0,5,0,9,959800,1060200,'million_input_tokens=4000000,million_output_tokens=20000000','2026-11-22','provider',1,1790000011.0);
CREATE TABLE wallets (
            account TEXT NOT NULL REFERENCES accounts (name),
            live INTEGER NOT NULL CHECK (live IN (0, 1)),
            granted INTEGER NOT NULL DEFAULT 0,
            spent INTEGER NOT NULL DEFAULT 0 CHECK (spent >= 0),
            held INTEGER NOT NULL DEFAULT 0 CHECK (held >= 0),
            slots INTEGER NOT NULL DEFAULT 0 CHECK (slots >= 0),
            window_start REAL NOT NULL DEFAULT 0.0,
            window_requests INTEGER NOT NULL DEFAULT 0 CHECK (window_requests >= 0),
            PRIMARY KEY (account, live),
            CHECK (granted >= spent + held)
        ) STRICT, WITHOUT ROWID
        ;
INSERT INTO "wallets" VALUES('acme',1,1000000,1000000,0,0,1795663008.14359,2);
INSERT INTO "wallets" VALUES('default',0,100000000,0,0,0,0.0,0);
CREATE INDEX grants_of_wallet ON grants (account, live, at);
CREATE INDEX usage_of_wallet ON usage (account, live, at);
CREATE INDEX usage_by_time ON usage (at);
CREATE INDEX repeats_by_end ON repeats (expires) WHERE expires IS NOT NULL;
CREATE INDEX keys_by_time ON keys (created, key_id);
CREATE INDEX keys_of_account ON keys (account, created, key_id);
COMMIT;
