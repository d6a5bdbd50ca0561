"""What each path answers, in a file per group. A new group is a file here with `routes(deps)`, and
its name in teacher_server.http.app."""
