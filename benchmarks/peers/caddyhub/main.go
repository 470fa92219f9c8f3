// A Caddy with a hub inside: package main adds the handler "hub" to a standard build. See hub.go.
//
// Usage: as Caddy, with a Caddyfile in which a site has the directive `hub unix/PATH-FOR-PUBLISHERS`.
package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

func main() { caddycmd.Main() }
