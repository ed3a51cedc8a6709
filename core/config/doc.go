// Package config is the one model of a node's configuration and its strict YAML
// reader. Every value knows where it was written, so that an error can say so.
// Options of components are kept undecoded until the component's own factory
// decodes them. Tomcat's files are read by core/config/serverxml into the same
// model. It imports core/session and channel types; it must not import
// interceptors, valves, plugins, fx or the container.
package config
