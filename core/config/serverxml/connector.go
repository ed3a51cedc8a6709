package serverxml

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/core/config"
)

// connectorUnused are attributes that tune Tomcat's threads, sockets and parsing.
const connectorUnused = "maxThreads minSpareThreads maxSpareThreads acceptCount enableLookups disableUploadTimeout redirectPort acceptorThreadCount " +
	"connectionLinger connectionUploadTimeout executor executorTerminationTimeoutMillis maxKeepAliveRequests maxPostSize maxSavePostSize maxSwallowSize " +
	"maxTrailerSize maxParameterCount maxCookieCount maxExtensionSize parseBodyMethods processorCache socketBuffer tcpNoDelay threadPriority " +
	"useBodyEncodingForURI URIEncoding useIPVHosts xpoweredBy proxyName proxyPort asyncTimeout allowTrace encodedSolidusHandling relaxedPathChars " +
	"relaxedQueryChars rejectIllegalHeader discardFacades emptySessionPath pollerThreadCount pollTime selectorTimeout keepAliveCount noCompressionUserAgents " +
	"restrictedUserAgents server serverRemoveAppProvidedValues useSendfile sendfileSize bindOnInit daemon debug bufferSize strategy minProcessors maxProcessors " +
	"tomcatAuthentication tomcatAuthorization packetSize useKeepAliveResponseReason allowHostHeaderMismatch maxHeaderCount scheme secure " +
	"compressionMinSize compressibleMimeType noCompressionStrongETag useAsyncIO enforceEncodingInGetWriter ajpFlush allowedRequestAttributesPattern"

func (r *reader) connector(el *element) {
	a := r.open(el, "Connector")
	protocol := a.get("protocol")
	if strings.Contains(strings.ToLower(protocol), "ajp") {
		r.ajp(el, a)
		return
	}
	c := config.Connector{Protocol: "http", Pos: el.pos}
	switch lower := strings.ToLower(protocol); {
	case lower == "" || strings.HasPrefix(lower, "http/") || strings.Contains(lower, "http11"):
	default:
		r.warn(a.posOf("protocol"), "the protocol "+cut(protocol)+" is not known: HTTP/1.1 is spoken", "", "")
	}
	port, ok := a.number(0, 65535, "port")
	if !ok && !a.has("port") {
		r.warn(el.pos, "the Connector has no port: 8080 is taken", "", `add port="8080"`)
		port = 8080
	}
	if port > 0 {
		port += r.portOffset
	}
	host := a.get("address")
	c.Address = net.JoinHostPort(host, strconv.Itoa(port))
	if host == "" {
		c.Address = ":" + strconv.Itoa(port)
		r.note(el.pos, "the Connector listens on all interfaces, "+c.Address, "that is Tomcat's meaning of a missing address", `write address="127.0.0.1" if only a front end on this machine shall reach it`)
	}
	c.HeaderTimeout = positive(a.millis("connectionTimeout"))
	c.IdleTimeout = positive(a.millis("keepAliveTimeout"))
	c.MaxHeaderBytes, _ = a.number(0, 16<<20, "maxHttpHeaderSize", "maxHttpRequestHeaderSize")
	if n, ok := a.number(-1, 1<<20, "maxConnections"); ok && n > 0 {
		c.MaxConnections = n
	}
	if v := strings.ToLower(a.get("compression")); v != "" && v != "off" {
		r.warn(a.posOf("compression"), "responses are not compressed", "", "let the front end compress them")
	}
	usable := r.connectorTLS(el, a, &c)
	a.ignore("maxHttpResponseHeaderSize")
	a.unused(connectorUnused, "they tune threads and sockets of Tomcat; connections cost little here")
	a.done()
	if usable {
		r.cfg.Connectors = append(r.cfg.Connectors, c)
	}
}

// positive drops the values of Tomcat for "no bound" and "default".
func positive(d time.Duration, ok bool) time.Duration {
	if !ok || d <= 0 {
		return 0
	}
	return d
}

func (r *reader) ajp(el *element, a *attrs) {
	port, _ := a.number(0, 65535, "port")
	r.unavailable(el.pos, "the AJP connector on port "+strconv.Itoa(port), "", "let the front end speak HTTP to this node: ProxyPass http://… or an HTTP balancer member")
	if a.get("secret", "requiredSecret") == "" && a.boolean(true, "secretRequired") {
		r.warn(el.pos, "the AJP connector has no secret", "whoever reaches the port can send requests as any user and read files (CVE-2020-1938); Tomcat since 9.0.31 does not start such a connector",
			`add secret="…" here and in the front end, and address="127.0.0.1"`)
	}
}

// connectorTLS reads TLS in the old form, attributes of the Connector, and the
// new one, SSLHostConfig and Certificate. It reports false if the connector
// would have to speak TLS and cannot.
func (r *reader) connectorTLS(el *element, a *attrs, c *config.Connector) bool {
	enabled := a.boolean(false, "SSLEnabled")
	t := config.TLS{Cert: a.get("SSLCertificateFile"), Key: a.get("SSLCertificateKeyFile"), ClientCA: a.get("SSLCACertificateFile")}
	keystore := a.get("keystoreFile", "keystore")
	a.ignore("sslProtocol sslEnabledProtocols clientAuth keystorePass keystoreType keyAlias keyPass truststoreFile truststorePass truststoreType algorithm ciphers " +
		"sslImplementationName defaultSSLHostConfigName useServerCipherSuitesOrder SSLProtocol SSLCipherSuite SSLPassword SSLVerifyClient SSLVerifyDepth " +
		"SSLCertificateChainFile SSLCACertificatePath SSLCARevocationFile SSLCARevocationPath SSLHonorCipherOrder keystoreProvider truststoreProvider")
	h2c := false
	for _, child := range el.children {
		switch r.child(el, child, "SSLHostConfig UpgradeProtocol Factory") {
		case "SSLHostConfig":
			ks := r.sslHost(child, &t)
			if keystore == "" {
				keystore = ks
			}
		case "UpgradeProtocol":
			u := r.open(child, "UpgradeProtocol")
			if u.class() == "Http2Protocol" {
				h2c = !enabled
			} else {
				r.warn(child.pos, "the upgrade protocol is not known", "", "")
			}
		}
	}
	if !enabled {
		if h2c {
			c.Protocol = "h2c"
		}
		return true
	}
	if t.Cert == "" || t.Key == "" {
		why := "no certificate is written"
		if keystore != "" {
			why = "its certificate is in the Java keystore " + keystore
		}
		r.unavailable(el.pos, "the TLS connector "+c.Address, why,
			"export certificate and key as PEM files and name them by certificateFile and certificateKeyFile: openssl pkcs12 -in keystore.p12 -out cert.pem -clcerts -nokeys, and -out key.pem -nocerts -nodes")
		return false
	}
	for _, f := range []*string{&t.Cert, &t.Key, &t.ClientCA} {
		if *f != "" {
			*f = r.resolve(r.base, *f)
		}
	}
	c.TLS = &t
	return true
}

func (r *reader) sslHost(el *element, t *config.TLS) (keystore string) {
	a := r.open(el, "SSLHostConfig")
	if v := strings.ToLower(a.get("certificateVerification")); v == "required" {
		t.ClientCA = a.get("caCertificateFile")
	} else if v != "" && v != "none" {
		r.warn(el.pos, "certificateVerification="+cut(v)+": client certificates are not asked for", "only required and none are known here", "")
	}
	if t.Cert == "" {
		t.Cert, t.Key = a.get("certificateFile"), a.get("certificateKeyFile")
	}
	keystore = a.get("certificateKeystoreFile")
	for _, c := range el.children {
		switch r.child(el, c, "Certificate OpenSSLConf") {
		case "Certificate":
			ca := r.open(c, "Certificate")
			if cert := ca.get("certificateFile"); cert != "" && t.Cert == "" {
				t.Cert, t.Key = cert, ca.get("certificateKeyFile")
			}
			if ks := ca.get("certificateKeystoreFile"); ks != "" {
				keystore = ks
			}
		}
	}
	return keystore
}

// isDir reports whether name is a directory.
func isDir(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.IsDir()
}

// windowsPath reports whether a name is absolute on another system.
func windowsPath(name string) bool {
	return len(name) > 2 && name[1] == ':' && (name[2] == '/' || name[2] == '\\') && !filepath.IsAbs(name)
}
