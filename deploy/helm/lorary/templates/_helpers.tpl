{{- define "lorary.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{ .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{- define "lorary.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "lorary.labels" -}}
{{ include "lorary.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "lorary.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (ternary (include "lorary.name" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{- /* The pod's own question to the server: over TLS only a program of the image can ask it. */ -}}
{{- define "lorary.probe" -}}
{{- $root := index . 0 -}}
{{- $service := index . 1 -}}
{{- if $root.Values.tls.existingSecret -}}
exec:
  command: ["python", "/opt/lorary/healthcheck.py", "127.0.0.1:{{ $root.Values.service.port }}"]
{{- else -}}
grpc:
  port: {{ $root.Values.service.port }}
  service: {{ $service | quote }}
{{- end }}
{{- end }}
