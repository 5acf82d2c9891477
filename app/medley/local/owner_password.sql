\getenv password MEDLEY_OWNER_PASSWORD
ALTER ROLE medley_owner PASSWORD :'password';
