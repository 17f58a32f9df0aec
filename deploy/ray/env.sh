# What Ray's commands need on every node. Set-up has ~/.bashrc read this, and `ray up` reads that before each command.
export PATH="$HOME/quire/.venv/bin:$PATH"
export RAY_AUTH_MODE=token # the token lies in ~/.ray/auth_token, where file_mounts put it
export RAY_USAGE_STATS_ENABLED=0
