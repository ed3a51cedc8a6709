// Package httpd holds the HTTP connectors: HTTP/1.1, HTTP/2 by ALPN under TLS,
// and both without TLS (h2c). A connector binds when it is started, bounds its
// connections, and drains them when it is stopped.
//
// It imports channel; it must not import interceptors, valves, plugins, fx or
// the container.
package httpd
