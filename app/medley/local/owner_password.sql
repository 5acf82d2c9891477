\set password `cat /run/secrets/owner_password`
ALTER ROLE medley_owner PASSWORD :'password';
