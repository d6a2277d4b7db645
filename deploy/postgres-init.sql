-- Prefect's records beside the ledger; both belong to the same user.
CREATE DATABASE prefect OWNER scanscribe;
