// Package serverxml reads Tomcat's configuration files (server.xml, context.xml,
// web.xml and the fragments of them that how-tos print) of all versions since
// 5.5 into the model of core/config, with findings: what is different here, what
// is not available, what was probably not meant.
//
// It only reads: it makes no components and knows no factories, only the names
// of the built-in ones. It must not import interceptors, valves, plugins, fx or
// the container.
package serverxml
