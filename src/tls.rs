//! The files of a TLS client, read anew for each connection so that a renewed certificate needs no restart, and what goes wrong
//! with TLS said in words. Shared by RabbitMQ and Redis.

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Where the files are; empty: none.
#[derive(Debug, Clone, Copy)]
pub struct TlsFiles<'a> {
    /// `amqp` or `redis`, for the sentences.
    pub section: &'static str,
    /// The authorities to trust, PEM, instead of the system's.
    pub ca: &'a str,
    /// The client's certificate chain, PEM.
    pub certificate: &'a str,
    /// Its private key, PEM.
    pub key: &'a str,
}

/// What they hold: PEM that was seen to be what it should be. Not `Debug`: a private key is among it.
#[derive(Default)]
pub struct TlsPem {
    /// At least one certificate.
    pub ca: Option<Vec<u8>>,
    /// At least one certificate, and a private key.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl TlsFiles<'_> {
    /// Whether any is named.
    #[must_use]
    pub const fn any(&self) -> bool {
        !(self.ca.is_empty() && self.certificate.is_empty() && self.key.is_empty())
    }

    /// Reads the files.
    ///
    /// # Errors
    /// A sentence that names the setting and the file, and nothing of what is in it.
    pub fn read(&self) -> Result<TlsPem, String> {
        let section = self.section;
        let ca = match self.ca {
            "" => None,
            path => Some(certificates(&format!("{section}.ca_file"), path)?),
        };
        let identity = match (self.certificate, self.key) {
            ("", "") => None,
            ("", _) | (_, "") => {
                return Err(format!("{section}.client_certificate_file and {section}.client_key_file go together"));
            }
            (certificate, key) => {
                let name = format!("{section}.client_key_file");
                let pem = file(&name, key)?;
                PrivateKeyDer::from_pem_slice(&pem)
                    .map_err(|_| format!("{name}: {key} holds no private key in PEM"))?;
                Some((certificates(&format!("{section}.client_certificate_file"), certificate)?, pem))
            }
        };
        Ok(TlsPem { ca, identity })
    }
}

fn file(setting: &str, path: &str) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("{setting}: {path} cannot be read: {error}"))
}

fn certificates(setting: &str, path: &str) -> Result<Vec<u8>, String> {
    let pem = file(setting, path)?;
    match CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>() {
        Ok(found) if !found.is_empty() => Ok(pem),
        _ => Err(format!("{setting}: {path} holds no certificates in PEM")),
    }
}

/// What an operator can do about a connection that failed with this text; empty where TLS has no part in it.
#[must_use]
pub fn advice(error: &str) -> &'static str {
    const ADVICE: &[(&str, &str)] = &[
        ("UnknownIssuer", ": no authority that is trusted here has signed the server's certificate (see ca_file)"),
        ("BadSignature", ": no authority that is trusted here has signed the server's certificate (see ca_file)"),
        ("NotValidForName", ": the server's certificate is for another host than the URL's"),
        ("not valid for name", ": the server's certificate is for another host than the URL's"),
        ("Expired", ": the server's certificate has expired"),
        ("expired", ": the server's certificate has expired"),
        ("CertificateRequired", ": the server wants a certificate of its clients (see client_certificate_file)"),
        ("HandshakeFailure", ": the server may want a certificate of its clients (see client_certificate_file)"),
        ("UnknownCA", ": the server does not accept this client's certificate (see client_certificate_file)"),
        ("BadCertificate", ": the server does not accept this client's certificate (see client_certificate_file)"),
        ("DecryptError", ": the server does not accept this client's certificate (see client_certificate_file)"),
        ("InvalidContentType", ": the server speaks no TLS on this port"),
    ];
    ADVICE.iter().find(|(mark, _)| error.contains(mark)).map_or("", |(_, advice)| advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_missing_or_something_else_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hunter2.pem");
        std::fs::write(&path, "-----BEGIN NONSENSE-----\ns3cret\n-----END NONSENSE-----\n").unwrap();
        let path = path.to_str().unwrap();
        let none = TlsFiles { section: "amqp", ca: "", certificate: "", key: "" };
        assert!(!none.any() && none.read().is_ok());
        for (files, named) in [
            (TlsFiles { ca: "/no/such/file", ..none }, "amqp.ca_file: /no/such/file"),
            (TlsFiles { ca: path, ..none }, "amqp.ca_file"),
            (TlsFiles { key: path, ..none }, "go together"),
            (TlsFiles { certificate: path, ..none }, "go together"),
            (TlsFiles { certificate: path, key: path, ..none }, "amqp.client_key_file"),
        ] {
            let Err(sentence) = files.read() else { panic!("{files:?}") };
            assert!(files.any() && sentence.contains(named) && !sentence.contains("s3cret"), "{sentence}");
        }
    }
}
