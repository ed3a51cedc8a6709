// Package server starts the servers that sessions are kept in (Redis,
// memcached, PostgreSQL) for tests, each on a free port of this machine, kills
// them as kill -9 does, and starts them again on the same port.
//
// The package must not import anything of this module.
package server
