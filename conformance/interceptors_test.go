package conformance_test

import (
	"testing"

	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/interceptors"
)

// options are those of the built-in interceptors that have no default.
var options = map[string]string{
	"encrypt": "{key: 0123456789abcdef0123456789abcdef}",
}

// The built-in interceptors are conformant.
func TestBuiltinInterceptors(t *testing.T) {
	for _, f := range interceptors.Builtin() {
		t.Run(f.Name, func(t *testing.T) {
			r := conformance.Run(t, conformance.InterceptorOf(f, options[f.Name]))
			for _, p := range r.Profiles {
				if p.Result == conformance.NonConformant {
					t.Errorf("%s is %s", p.Name, p.Result)
				}
			}
		})
	}
}
